"""The reference that `sync_ref_model` moves: a checkpoint holds it, as it holds the policy's weights."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model

from ..errors import UserError
from ..store.checkpoints import explain_read_errors

# Not beside the policy's weights, where whatever reads a model's folder would take it for a part of them
_FILE = Path("reference", "model.safetensors")


def save_reference(trainer: Any, folder: Path) -> None:
    """Write the reference into a checkpoint, where it moves and a run may go on from there."""
    reference = _moved(trainer)
    if reference is not None and trainer.args.should_save and not trainer.args.save_only_model:
        (folder / _FILE).parent.mkdir(exist_ok=True)
        save_model(reference, str(folder / _FILE))


def why_not_resumed(trainer: Any) -> str | None:
    """Why a run whose reference moves can't be resumed under this launch."""
    moves = trainer.args.sync_ref_model
    return "FSDP and DeepSpeed save no moved reference" if moves and _moved(trainer) is None else None


def require_reference(trainer: Any, folder: Path) -> None:
    """Refuse to go on from a checkpoint without the reference, where that moves.

    Raises:
        UserError: it has none.
    """
    if trainer.args.sync_ref_model and not (folder / _FILE).is_file():
        raise UserError(
            f"`resume_from_checkpoint` {folder} holds no moved reference, which `sync_ref_model: true` needs. FSDP, "
            "DeepSpeed and `save_only_model` save none. Leave it out to start anew."
        )


def load_reference(trainer: Any, folder: Path) -> None:
    """Give the reference the weights that it has in a checkpoint, where it moves."""
    reference = _moved(trainer)
    if reference is not None:
        with explain_read_errors(folder, trainer.args.output_dir):
            load_model(reference, folder / _FILE)


def _moved(trainer: Any) -> Any:
    """The reference, where it moves and each process has all of its weights."""
    if not trainer.args.sync_ref_model or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    return trainer.accelerator.unwrap_model(trainer.ref_model, keep_torch_compile=False)
