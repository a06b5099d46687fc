"""sentence-transformers reads the plain folder."""

from client import run
from sentence_transformers import SentenceTransformer


def encode(folder, texts):
    model = SentenceTransformer(folder, device="cpu")
    return model.encode(texts), model.encode(texts, prompt_name="query")


run(encode, "sentence-transformers", "transformers")
