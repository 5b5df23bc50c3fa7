"""Groups of stages in the processes of another deployment."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import torch
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from unclip.generation.engine.request import EncodedCaption, EngineFullError, Picture, Result
from unclip.serving import context
from unclip.serving.groups import Call, GroupUnavailableError, Shown, StageGroup

_HEALTH_S = 5.0


class HandleGroup(StageGroup):
    """The `StageReplica`s of a deployment; Serve chooses the least busy one for each call.

    Args:
        name: of the deployment, for messages.
        handle: to it.
    """

    def __init__(self, name: str, handle: DeploymentHandle) -> None:
        self._name = name
        self._handle = handle

    async def generate(self, call: Call) -> Result:
        result: Result = await self._ask("generate", call)
        return result

    async def watch(self, call: Call, previews: Sequence[float]) -> AsyncGenerator[Shown | Result, None]:
        answers = self._handle.options(method_name="watch", stream=True).remote(call, tuple(previews))
        try:
            async for answer in answers:
                yield answer
        except (Exception, asyncio.CancelledError) as error:
            raise self._ours(error) from None
        finally:
            _cancel(answers)

    async def encode_texts(self, texts: Sequence[str], revision: str) -> list[EncodedCaption]:
        captions: list[EncodedCaption] = await self._ask("encode_texts", list(texts), revision, context.current())
        return captions

    async def encode_pictures(self, pictures: Sequence[Picture], revision: str) -> torch.Tensor:
        embeds: torch.Tensor = await self._ask("encode_pictures", list(pictures), revision, context.current())
        return embeds

    async def check_health(self) -> None:
        """Raises `GroupUnavailableError` where no process answers soon, and with what is wrong with the one that does."""
        try:
            async with asyncio.timeout(_HEALTH_S):
                await self._ask("check_health")
        except TimeoutError:
            raise GroupUnavailableError(f"{self._name}: no process answers") from None

    async def uses(self, bundle: str) -> bool:
        """Whether all processes that there are use the bundle at an address; `BundleError` where one has refused it."""
        try:
            answers = await self._handle.broadcast("uses", bundle).results_async(timeout_s=_HEALTH_S)
        except Exception as error:
            ours = self._ours(error)
            if isinstance(ours, GroupUnavailableError | TimeoutError):
                return False
            raise ours from None
        return all(answers)

    async def _ask(self, method: str, *args: object) -> Any:
        answer = self._handle.options(method_name=method).remote(*args)
        try:
            return await answer
        except asyncio.CancelledError as error:
            _cancel(answer)
            raise self._ours(error) from None
        except Exception as error:
            raise self._ours(error) from None

    def _ours(self, error: BaseException) -> BaseException:
        """What a group in this process would have raised; Ray wraps it, and has errors of its own."""
        while isinstance(error, RayTaskError):
            error = error.cause
        match error:
            case asyncio.CancelledError() | TaskCancelledError():
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    return asyncio.CancelledError()
                return GroupUnavailableError(f"{self._name}: the process that was at work was ended")
            case BackPressureError():
                return EngineFullError(f"{self._name}: {error}")
            case RayError() | RayServeException():
                return GroupUnavailableError(f"{self._name}: {type(error).__name__}")
        return error


def _cancel(answer: Any) -> None:
    """Ends the work for an answer that nobody waits for any more; one that is there stays as it is."""
    with contextlib.suppress(Exception):
        answer.cancel()
