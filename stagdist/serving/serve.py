"""The serve command on one rank: check everything, build the stage, serve the requests of the HTTP process."""

import signal
from contextlib import suppress
from math import prod
from pathlib import Path

from stagdist import __version__
from stagdist.decode.engine import Engine
from stagdist.decode.frontend.command_line import say
from stagdist.decode.frontend.deployment import deploy
from stagdist.decode.frontend.interrupts import Interrupts
from stagdist.decode.operations import operate
from stagdist.decode.runtime.build import EngineOptions, joined_world
from stagdist.decode.runtime.warm_up import dry_pass
from stagdist.errors import TransportError
from stagdist.parallel.layout import model_parameters
from stagdist.parallel.world import World
from stagdist.serving.bridge import EngineBridge
from stagdist.serving.http_child import HttpProcess, HttpProcessError
from stagdist.serving.protocol import Hello, ServedModel, TokenizerContent
from stagdist.serving.settings import ServerSettings
from stagdist.telemetry.pulse import Phase, Pulse


class Server:
    """One run of the serve command on one rank: rank 0 leads, the others follow.

    The constructor checks everything that can be wrong before a process group exists, and builds nothing.

    Args:
        model: model directory.
        options: how the model is run.
        world: this process among all.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckpointError: see `deploy`.
        DataError: see `deploy`.
        ConfigError: see `deploy`.
    """

    def __init__(self, model: Path, options: EngineOptions, world: World, device: str):
        self._model = model
        self._deployment = deploy(model, options, world, device)

    def follow(self, pulse: Pulse) -> int:
        """Work for rank 0 until it ends. Returns the exit code.

        Raises:
            TransportError: a rank has ended; names stage and step.
        """
        with joined_world(self._deployment.plan, self._deployment.device) as transport:
            # Launchers signal all ranks, and rank 0 still needs this one. When rank 0 dies, the transport fails.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            stage = self._deployment.build(transport, pulse)
            dry_pass(stage)
            pulse.beat(Phase.RECEIVE, 0)
            operate(stage, transport, None)
        return 0

    def lead(
        self,
        http: HttpProcess,
        settings: ServerSettings,
        interrupts: Interrupts,
        pulse: Pulse,
        *,
        max_queued_tokens: int,
    ) -> int:
        """Serve on rank 0 until a signal. Returns the exit code.

        Args:
            http: connected.
            max_queued_tokens: limit of prompt tokens that wait for a slot.

        Raises:
            TransportError: a rank has ended; names stage and step.
            HttpProcessError: the HTTP process has ended.
        """
        http.send(self._hello())
        http.send({"kind": "state", "state": "loading", "reason": "the model is being loaded"})
        try:
            with joined_world(self._deployment.plan, self._deployment.device) as transport:
                stage = self._deployment.build(transport, pulse)
                dry_pass(stage)  # all ranks together; the first request finds every shape warm
                pulse.beat(Phase.RECEIVE, 0)
                engine = self._deployment.engine(
                    stage, transport, max_waiting=settings.max_queued_requests, max_waiting_tokens=max_queued_tokens
                )
                return self._serve(engine, http, settings, interrupts)
        except TransportError as error:
            with suppress(HttpProcessError):
                http.send({"kind": "state", "state": "failed", "reason": str(error)})
            raise

    def _serve(self, engine: Engine, http: HttpProcess, settings: ServerSettings, interrupts: Interrupts) -> int:
        bridge = EngineBridge(http, engine, settings.drain_timeout_s)
        interrupts.stop_with(bridge.drain)
        bridge.start()
        http.send({"kind": "state", "state": "ready", "reason": ""})
        limits, grid = self._deployment.plan.limits, self._deployment.grid_text()
        slots = f"{limits.num_slots} slots of {limits.max_context} positions"
        say(f"serving {self._model} at http://{settings.host}:{settings.port} ({grid}; {slots})")
        engine.run(bridge.take)
        bridge.close()
        if bridge.lost is not None:
            raise bridge.lost
        cut = f"; {bridge.cut_off} requests were cut off" if bridge.cut_off else ""
        say(f"shut down after {engine.stats().generation_tokens_total} tokens{cut}")
        return (interrupts.code or 1) if bridge.cut_off else 0

    def _hello(self) -> Hello:
        plan, tokenizer = self._deployment.plan, self._deployment.tokenizer
        model = plan.model
        served = ServedModel(
            names=[self._model.resolve().name],
            path=str(self._model.resolve()),
            created=int(self._model.stat().st_mtime),
            max_context=plan.limits.max_context,
            vocab_size=model.vocab_size,
            sections=model.num_sections,
            stages=plan.topology.num_stages,
            tensor=plan.grid.tensor,
            slots=plan.limits.num_slots,
            parameters=sum(prod(spec.shape) for spec in model_parameters(model)),
            precision=str(plan.options.precision),
            weights=plan.options.weights or str(plan.options.precision),
            version=__version__,
            connection=model.connection,
            stagger=model.stagger,
            recurrent=plan.topology.recurrent,
        )
        content = TokenizerContent(
            json=tokenizer.to_json(),
            end_token=tokenizer.end_token,
            special_tokens=tokenizer.special_tokens,
            chat_template=tokenizer.chat_template,
        )
        return Hello(kind="hello", model=served, tokenizer=content)
