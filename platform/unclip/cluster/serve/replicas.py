"""What runs in Serve's processes: some stages of a bundle, and the app that speaks HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from unclip.cluster.serve.addresses import resolved
from unclip.cluster.serve.gate import Doors, Gate
from unclip.cluster.serve.handles import HandleGroup
from unclip.cluster.serve.meters import RayMeters
from unclip.cluster.serve.scaling import QUEUED_STEPS
from unclip.config.base import Config, ConfigError
from unclip.generation.engine.request import EncodedCaption, Picture, Result
from unclip.pipelines.bundle import BundleError
from unclip.pipelines.cascade import plan_cascade
from unclip.serving.api.app import create_app
from unclip.serving.config import STAGES, GroupStage, ReplicaConfig, ServeConfig
from unclip.serving.context import Context, within
from unclip.serving.drawing.service import Service, build_service
from unclip.serving.groups import Call, Shown, StageGroup
from unclip.serving.observe import logs, traces
from unclip.serving.stages.chain import Chain
from unclip.serving.stages.group import LocalGroup
from unclip.serving.stages.model import Model, Models

if TYPE_CHECKING:
    from unclip.serving.batches import Batches

Groups = Sequence[tuple[tuple[GroupStage, ...], DeploymentHandle]]
"""The deployments that hold stages, with these, in the order of the cascade."""
_INGRESS = "ingress"
_CLOSE_S = 10.0
_LOOK_S = 0.2


class UserConfig(Config):
    """What Serve changes in processes that run; everything else in a server's configuration replaces them."""

    bundle: str
    """Folder or s3:// address of the bundle that is served."""


class StageReplica:
    """A process that holds `stages`; answers what a `StageGroup` is asked."""

    def __init__(self, config: ServeConfig, stages: tuple[GroupStage, ...], memory_share: float) -> None:
        name = group_name(stages)
        _observe(config, name)
        self._group = LocalGroup(config, stages, memory_share=memory_share, meters=RayMeters())
        self._weights = _Weights(name, self._group.load)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve calls it at the start and whenever `user_config` has changed."""
        await self._weights.follow(user_config)

    async def generate(self, call: Call) -> Result:
        with _working_for(call.context):
            return await self._group.generate(call)

    async def watch(self, call: Call, previews: Sequence[float]) -> AsyncIterator[Shown | Result]:
        with _working_for(call.context):
            async with aclosing(self._group.watch(call, previews)) as steps:  # or its end would wait for the collector
                async for shown in steps:
                    yield shown

    async def encode_texts(self, texts: Sequence[str], revision: str, context: Context) -> list[EncodedCaption]:
        with _working_for(context):
            return await self._group.encode_texts(texts, revision)

    async def encode_pictures(self, pictures: Sequence[Picture], revision: str, context: Context) -> torch.Tensor:
        with _working_for(context):
            return await self._group.encode_pictures(pictures, revision)

    async def uses(self, bundle: str) -> bool:
        """Whether its weights are those of the bundle at this address; `BundleError` where it has refused that."""
        return self._weights.uses(bundle)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {QUEUED_STEPS: self._group.queued_steps()}

    async def check_health(self) -> None:
        await self._group.check_health()

    async def __del__(self) -> None:
        await self._group.close(_CLOSE_S)
        traces.close()


@serve.ingress()
class Ingress:
    """A process that speaks HTTP; it holds all `stages` itself where there are no `groups`."""

    def __init__(self, config: ServeConfig, stages: tuple[GroupStage, ...], groups: Groups) -> None:
        _observe(config, _INGRESS)
        self._config, self._stages = config, stages
        self._meters = RayMeters()
        on_device = on_its_device(config, config.ingress)
        self._local = None if groups else LocalGroup(on_device, stages, meters=self._meters)
        self._remote = [(held, HandleGroup(group_name(held), handle)) for held, handle in groups]
        self._models: Models | None = None
        self._weights = _Weights(_INGRESS, self._use)
        self._doors = Doors()
        self._running = AsyncExitStack()

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls it after the constructor and before `reconfigure`, and the app needs a model."""
        await self._weights.follow(serve.get_replica_context()._deployment_config.user_config)
        assert self._models is not None
        groups: list[tuple[tuple[GroupStage, ...], StageGroup]] = [*self._remote]
        checks = [group.check_health for _, group in self._remote]
        if self._local is not None:
            groups, checks = [(self._stages, self._local)], [self._local.check_health]
        service = build_service(
            self._config,
            Chain(groups, self._models, meters=self._meters),
            self._models,
            meters=self._meters,
            processes=self._config.ingress.max_replicas,
            checks=checks,
        )
        app = create_app(service, batches=await self._batches(service))
        app.add_middleware(Gate, doors=self._doors)
        return app

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve calls it at the start and whenever `user_config` has changed."""
        await self._weights.follow(user_config)

    async def drain(self, patience_s: float) -> bool:
        """Refuses new requests and waits for those under way; whether all were done in time."""
        return await self._doors.drain(patience_s)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {} if self._local is None else {QUEUED_STEPS: self._local.queued_steps()}

    async def check_health(self) -> None:
        if self._local is not None:
            await self._local.check_health()

    async def __del__(self) -> None:
        await self._running.aclose()
        if self._local is not None:
            await self._local.close(_CLOSE_S)
        traces.close()

    async def _batches(self, service: Service) -> Batches | None:
        if self._config.batches.folder is None:
            return None
        from unclip.cluster.serve.batches import RayBatchRunner  # with all of the bulk job: seconds of every start
        from unclip.serving.batches import Batches

        runner = RayBatchRunner(self._config)
        batches = Batches(self._config, runner, models=service.models, policy=service.policy)
        await self._running.enter_async_context(batches.running())
        return batches

    async def _use(self, uri: str) -> None:
        """Where groups hold the weights, requests change over when all of them have the new ones."""
        model = await asyncio.to_thread(Model.load, uri, self._config.options)
        if (stages := stages_of(model)) != self._stages:
            raise BundleError(f"{uri!r} has {', '.join(stages)}, and the server was made for {', '.join(self._stages)}")
        if self._local is not None:
            await self._local.load(uri)
        for _, group in self._remote:
            while not await group.uses(uri):
                await asyncio.sleep(_LOOK_S)
        if self._models is None:
            self._models = Models(model)
        else:
            self._models.use(model)


class _Weights:
    """Which bundle a process uses: the one of its `user_config`, or, while that is not taken on, the one before.

    Serve ends a process whose `reconfigure` raises, and sends it no requests until it returns. So only the first bundle is
    waited for, and has to do; later ones are taken on beside the work, and a refusal is told to the log.

    Args:
        name: of the process.
        use: takes the bundle at an address on, or raises.
    """

    def __init__(self, name: str, use: Callable[[str], Awaitable[None]]) -> None:
        self._name, self._use = name, use
        self._wanted: str | None = None
        self._used: str | None = None
        self._refusal: Exception | None = None
        self._changing: asyncio.Task[None] | None = None

    async def follow(self, user_config: Mapping[str, Any]) -> None:
        """`user_config` is what it says from now on."""
        if self._wanted is None:
            bundle = resolved(UserConfig.from_dict(user_config).bundle)
            await self._use(bundle)
            self._wanted = self._used = bundle
            return
        try:
            bundle = resolved(UserConfig.from_dict(user_config).bundle)
        except ConfigError as error:
            logs.event("user_config_refused", level=logging.ERROR, process=self._name, error=error)
            return
        if bundle == self._wanted:
            return
        if self._changing is not None:
            self._changing.cancel()
        self._wanted, self._refusal = bundle, None
        self._changing = asyncio.create_task(self._change(bundle))

    def uses(self, bundle: str) -> bool:
        """Whether it is the one at this address; `BundleError` where that was refused."""
        if bundle == self._wanted and self._refusal is not None:
            raise BundleError(f"{self._name}: {self._refusal}")
        return bundle == self._used

    async def _change(self, bundle: str) -> None:
        try:
            await self._use(bundle)
        except Exception as error:
            self._refusal = error
            kept = {"bundle": bundle, "kept": self._used}
            logs.event("change_refused", level=logging.ERROR, process=self._name, **kept, error=error)
        else:
            self._used = bundle
            logs.event("bundle_changed", process=self._name, bundle=bundle)


def group_name(stages: Sequence[GroupStage]) -> str:
    """Of the deployment that holds them, as `prior-decoder`."""
    return "-".join(stages)


def stages_of(model: Model) -> tuple[GroupStage, ...]:
    """What pictures of a model go through, its CLIP included where it has one."""
    cascade = plan_cascade(model.configs, model.options, with_prior="prior" in model.configs)
    there = {*cascade.sampling, *(["clip"] if model.bundle.clip is not None else [])}
    return tuple(stage for stage in STAGES if stage in there)


def on_its_device(config: ServeConfig, replica: ReplicaConfig) -> ServeConfig:
    """A process that claims no GPU takes none, even where it sees one."""
    return config.merged({"device": "cpu"}) if config.device == "auto" and not replica.num_gpus else config


@contextmanager
def _working_for(context: Context) -> Iterator[None]:
    """What is logged and measured in the block belongs to a request of another process."""
    with within(context), traces.continued(context.trace):
        yield


def _observe(config: ServeConfig, process: str) -> None:
    logs.configure()
    traces.configure(config.tracing, process)
