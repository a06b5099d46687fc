"""Turn raw contrastive data, or anybody's pairs and labelled texts, into token ids for training."""

import sys

from ml_embed.commands.tokenize import main

if __name__ == "__main__":
    sys.exit(main())
