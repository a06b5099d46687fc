"""The prompts that mteb's entry of a model holds, as the `datasets` of a config."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ml_embed.errors import UserError
from ml_embed.evaluation.mteb import parts_of, require_mteb, roles

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.models import ModelMeta
    from mteb.types import PromptType


def prompts_in_mteb(model: str, tasks: Iterable["AbsTask"]) -> dict[str, dict[str, str]]:
    """What stands in front of the inputs of each task when mteb runs a model.

    Only the two loaders that most models have are known: sentence-transformers with named prompts,
    and with instructions in a template. Nothing is fetched.

    Args:
        model: its name in mteb's register.
        tasks: mteb's.
    Returns:
        task -> prompt and passage_prompt, "" where mteb has none.
    Raises:
        UserError: mteb does not know the model, or its entry holds no prompts in these forms.
    """
    require_mteb()
    from mteb.types import PromptType

    meta = _entry(model)
    found = {}
    for task in parts_of(tasks):
        texts = {role: _text(meta, task, role) for role in roles(task)}
        document = texts.pop(PromptType.document, None)
        found[task.metadata.name] = {"prompt": next(iter(texts.values()), "")} | (
            {} if document is None else {"passage_prompt": document}
        )
    return found


def _entry(model: str) -> "ModelMeta":
    import mteb
    from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    try:
        meta = mteb.get_model_meta(model, fetch_from_hf=False)
    except KeyError as error:
        raise UserError(
            f"mteb has no such model: {error.args[0]!s}; its names are those of the hub, such as "
            "codefuse-ai/F2LLM-v2-0.6B"
        ) from None
    forms = {
        InstructSentenceTransformerModel: {"prompts_dict", "instruction_template"},
        SentenceTransformerEncoderWrapper: {"model_prompts"},
    }
    if not forms.get(meta.loader, set()) & meta.loader_kwargs.keys():
        raise UserError(
            f"mteb's entry of {model} holds no table of prompts: they stand in its own code, or in "
            "the model's folder; write them into `datasets` by hand"
        )
    return meta


def _text(meta: "ModelMeta", task: "AbsTask", role: "PromptType | None") -> str:
    """What mteb itself would put in front."""
    from mteb.models.abs_encoder import AbsEncoder, get_prompt
    from mteb.types import PromptType

    settings: dict[str, Any] = meta.loader_kwargs
    if "model_prompts" in settings:
        return get_prompt(settings["model_prompts"], task.metadata, role) or ""
    if role == PromptType.document and not settings.get("apply_instruction_to_passages", True):
        return ""

    class Instructed(AbsEncoder):
        """The rule by which mteb's encoders choose an instruction, without a model."""

        instruction_template = staticmethod(settings.get("instruction_template") or "")  # type: ignore[arg-type]
        prompts_dict = settings.get("prompts_dict")

        def encode(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    text = Instructed().get_task_instruction(task.metadata, role)
    return text if isinstance(text, str) else ""  # of some tasks, a text for each role
