"""vLLM's engine, without its server."""

from client import run
from vllm import LLM


def encode(folder, texts):
    model = LLM(model=folder, runner="pooling", dtype="float32", enforce_eager=True)
    outputs = model.embed(texts, truncate_prompt_tokens=-1)
    return [output.outputs.embedding for output in outputs], None


if __name__ == "__main__":  # it starts processes
    run(encode, "vllm")
