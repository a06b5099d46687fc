"""llama.cpp's own server in a process; keys and values in 32 bits, as the Embedder computes."""

import xllamacpp as llama
from client import run


def encode(folder, texts):
    params = llama.CommonParams()
    params.model.path = f"{folder}/model.gguf"
    params.embedding = True
    params.n_parallel = 1
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server = llama.Server(params)
    answers = [server.handle_embeddings({"input": [text], "model": "model"}) for text in texts]
    return [answer["data"][0]["embedding"] for answer in answers], None


run(encode, "xllamacpp")
