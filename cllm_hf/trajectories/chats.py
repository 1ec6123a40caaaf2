"""Chat messages of a user: what a template would fail at, or take in silence, is said with a name and a remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


# What datasets call the one who responds; templates know `assistant`.
_RESPONDERS = ("assistant", "model", "gpt", "bot", "chatbot")
# Roles that templates know; of others some say nothing and leave the message out.
_KNOWN = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_REMEDY = 'Write each message as `{"role": "user", "content": "..."}`'


def check_chat(messages: Sequence[Any], name: str) -> None:
    """
    Check that messages are a chat that waits for a response.

    Args:
        messages (`Sequence[Any]`): the messages.
        name (`str`): what to call them, such as `"prompt 3"`.

    Raises:
        ValueError: for a message without `role` or `content`, images and other parts that are no text, and a chat
            that is empty or ends with a response.
    """
    check_messages(messages, name)
    if not messages:
        raise ValueError(f"A chat must have at least one message, got none in {name}. Leave it out.")
    role = messages[-1]["role"]
    if role.lower() in _RESPONDERS:
        raise ValueError(
            f"A chat must end with what the model responds to, got {name}, which ends with a response, of the role "
            f"{role!r}. Drop that message, or pass its text in `response` (`responses` of the builder)."
        )


def check_messages(messages: Sequence[Any], name: str) -> None:
    """
    Check that each of some messages has a role and text.

    Args:
        messages (`Sequence[Any]`): the messages.
        name (`str`): what to call them.

    Raises:
        ValueError: if not.
    """
    for number, message in enumerate(messages):
        where = f"message {number} of {name}"
        if not isinstance(message, Mapping):
            raise ValueError(f"A chat must be a list of messages, got {reprlib.repr(message)} as {where}. {_REMEDY}.")
        if not isinstance(message.get("role"), str):
            shown = f"the keys {', '.join(map(repr, message))}" if "role" not in message else repr(message["role"])
            remedy = _REMEDY
            if "from" in message or "value" in message:
                remedy += (
                    "; in ShareGPT's form `from` is the role (`human` is `user`, `gpt` is `assistant`) and `value` is "
                    "the content"
                )
            raise ValueError(f"A message must have text in `role`, got {shown} in {where}. {remedy}.")
        _check_content(message, where)


def _check_content(message: Mapping[str, Any], where: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    if content is None:
        if message.get("tool_calls") or message.get("function_call"):
            return
        raise ValueError(f"A message must have text in `content`, got none in {where}. {_REMEDY}, or leave it out.")
    if not isinstance(content, Sequence):
        raise ValueError(f"A message must have text in `content`, got {reprlib.repr(content)} in {where}. {_REMEDY}.")
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        if kind != "text":
            raise ValueError(
                f"The parts of a message must be text, got {reprlib.repr(part)} in {where}. Trajectories are of text "
                "alone: leave out such parts, or such prompts."
            )


def render_chat(
    messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase, name: str, is_answered: bool = False
) -> str:
    """
    Turn chat messages into text by the tokenizer's chat template.

    Args:
        messages (`Sequence[Mapping]`): the messages.
        tokenizer (`transformers.PreTrainedTokenizerBase`): has the template.
        name (`str`): what to call them, such as `"prompt 3"`.
        is_answered (`bool`): whether they end with a response, so that the template does not begin one.

    Returns:
        `str`: with the special tokens of the template.

    Raises:
        ValueError: as `check_chat`, if there is no template, or if it does not take these messages.
    """
    (check_messages if is_answered else check_chat)(messages, name)
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=not is_answered, tokenize=False)
    except Exception as error:  # a template is a program of its own: it raises anything
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"Chat messages take a tokenizer with a chat template, got {name} and a tokenizer without one. Use an "
                "instruct model, set `tokenizer.chat_template`, or pass the prompt as text."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The tokenizer's chat template must take the messages, got {name}, at which it fails ({reason}). "
            f"{_REMEDY}, with roles that the template knows and in an order that it takes, and text instead of a list "
            "of parts."
        ) from error
    _check_rendered(messages, str(text), name)
    return str(text)


def _check_rendered(messages: Sequence[Mapping[str, Any]], text: str, name: str) -> None:
    """Refuse what a template takes without a word: a list as Python shows it, and a message that it leaves out."""
    for number, message in enumerate(messages):
        content, role = message.get("content"), message["role"]
        if content and not isinstance(content, str) and str(content) in text:
            raise ValueError(
                "The tokenizer's chat template takes text alone in `content`, got a list of parts in message "
                f"{number} of {name}. Join their texts to one."
            )
        if isinstance(content, str) and role not in _KNOWN and content.strip() not in text:
            raise ValueError(
                f"The tokenizer's chat template leaves out messages of the role {role!r}, got one as message {number} "
                f"of {name}. {_REMEDY}, with roles that the template knows."
            )
