"""The model that a policy is compared with: when it must be named, and which one can't be it."""

from ...errors import UserError
from ...models.loading import ModelSource


def require_reference(policy: ModelSource, reference: ModelSource | None) -> None:
    """Refuse a policy that nothing can be compared with.

    Raises:
        UserError: a whole model without a reference; that of an adapter is its base.
    """
    if reference is None and policy.adapter is None:
        raise UserError(
            f"`reference` is missing. `model_name_or_path` {policy.name} is a whole model, not an adapter whose base "
            "could be the reference. Name the model that it was before training."
        )


def check_vocabulary(policy: ModelSource, reference: ModelSource) -> None:
    """Refuse a reference that can't read the policy's tokens.

    Raises:
        UserError: their vocabularies are of different sizes.
    """
    own, other = (source.load_config().get_text_config().vocab_size for source in (policy, reference))
    if own != other:
        raise UserError(
            f"`reference` {reference.adapter or reference.name} has a vocabulary of {other} tokens, but "
            f"`model_name_or_path` {policy.adapter or policy.name} has {own}. Name the model that it was before "
            "training."
        )
