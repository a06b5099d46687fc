// transformers.js in node: the graph's own output, without its feature-extraction pipeline.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";

const [folder, texts, output] = process.argv.slice(2);
// from the environment that this runs in, not from where this file lies
const path = createRequire(`${process.cwd()}/x.js`).resolve("@huggingface/transformers");
const { AutoModel, AutoTokenizer, env } = await import(path);
env.allowRemoteModels = false;
env.localModelPath = "/";

const tokenizer = await AutoTokenizer.from_pretrained(folder);
const model = await AutoModel.from_pretrained(folder, { dtype: "fp32" });
const inputs = tokenizer(JSON.parse(readFileSync(texts)), { padding: true, truncation: true });
const { sentence_embedding } = await model(inputs);
writeFileSync(output, JSON.stringify({
  versions: `@huggingface/transformers ${env.version}`,
  vectors: sentence_embedding.tolist(),
  queries: null,
}));
