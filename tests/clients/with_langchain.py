"""LangChain's embeddings of sentence-transformers, with the folder's prompt for queries."""

from client import run
from langchain_huggingface import HuggingFaceEmbeddings


def encode(folder, texts):
    model = HuggingFaceEmbeddings(
        model_name=folder,
        model_kwargs={"device": "cpu"},
        query_encode_kwargs={"prompt_name": "query"},
    )
    return model.embed_documents(texts), [model.embed_query(text) for text in texts]


run(encode, "langchain-huggingface", "sentence-transformers")
