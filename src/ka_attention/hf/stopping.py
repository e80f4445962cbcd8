"""Stop strings in continuous batching, which transformers does not look at (read in 5.17 to 5.24)."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Any

from transformers.generation.continuous_batching import RequestState, RequestStatus


def ends_with_any(tokenizer: Any, strings: Sequence[str]) -> Callable[[list[int]], bool]:
    """Whether the text of some tokens holds one of the strings, which the last token may have completed.

    A token may stand for less than a character; for none at all it seldom does.
    """
    longest = max(map(len, strings)) + 4

    def found(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens[-longest:], skip_special_tokens=True)
        return any(string in text for string in strings)

    return found


class StoppingState(RequestState):
    """A request that is over as soon as ``is_over`` says so of its new tokens."""

    is_over: Callable[[list[int]], bool]

    def update_and_check_completion(self, token_id: int, logprob: float | None) -> bool:
        """Take a new token; whether the request is complete."""
        if super().update_and_check_completion(token_id, logprob):
            return True
        if not self.is_over(self.to_generation_output().generated_tokens):
            return False
        self.status = RequestStatus.FINISHED
        return True


class Requests(queue.Queue):
    """The requests that come in; those with an entry in ``conditions`` leave as `StoppingState`."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self.conditions: dict[str, Callable[[list[int]], bool]] = {}

    def put(self, item: Any, *args: Any, **kwargs: Any) -> None:
        """Add a request."""
        if (condition := self.conditions.pop(item.request_id, None)) is not None:
            item.__class__, item.is_over = StoppingState, condition
        super().put(item, *args, **kwargs)
