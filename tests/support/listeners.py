"""The page's listeners, called as a program without the page calls them: by their numbers, with any data."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.context import LocalContext
from gradio.state_holder import SessionState

from tests.support.asgi import HOST, Answer, send
from tests.support.waiting import LIMIT

JSON = (*HOST, ("Content-Type", "application/json"))
_sessions = itertools.count()


@dataclass(frozen=True)
class Outcome:
    """What a call came to; `text` is everything that was sent back."""

    success: bool
    text: str


class Page:
    """Calls the listeners of a guarded server; `blocks` is the page that it serves."""

    def __init__(self, app: Any, blocks: Any):
        self.app, self.blocks = app, blocks
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.ask("GET", "/gradio_api/startup-events")

    def close(self) -> None:
        async def end() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        self._wait(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def ask(self, method: str, target: str, body: Any = None, headers: Any = JSON) -> Answer:
        """As asgi.ask, on the one loop that this server's requests share. body: bytes, or sent as JSON."""
        return self._wait(self._sent(method, target, body, headers))

    def call(self, number: int, data: Any, event: Any = None) -> Outcome:
        """Call a listener and wait for its end."""
        return self._wait(self._called(number, data, event))

    def run(self, number: int, data: Any, event: Any = None, states: bool = False) -> Outcome:
        """As `call` without the queue and the way there: much quicker, with the same checks of the inputs.

        states: `data` has the values of the session's states, too, which no client can send.
        """

        async def alone() -> Outcome:
            LocalContext.blocks.set(self.blocks)
            fn, state = self.blocks.fns[number], SessionState(self.blocks)
            for component, value in zip(fn.inputs, data, strict=False) if states else ():
                if isinstance(component, gr.State):
                    state[component._id] = value
            try:
                done = await self.blocks.process_api(
                    fn, data, state, event_data=gr.EventData(None, event or {}), root_path=""
                )
            except Exception as error:  # whatever a listener raises is what the client is told
                return Outcome(False, str(error))
            return Outcome(True, repr(done["data"]))

        return self._wait(alone())

    def _wait(self, going: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(going, self._loop).result(LIMIT)

    def _sent(self, method: str, target: str, body: Any, headers: Any = JSON) -> Coroutine[Any, Any, Answer]:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        return send(self.app, method, target, headers, data)

    async def _called(self, number: int, data: Any, event: Any) -> Outcome:
        session = f"session{next(_sessions)}"
        body = {"fn_index": number, "data": data, "event_data": event, "session_hash": session}
        joined = await self._sent("POST", "/gradio_api/queue/join", body)
        if joined.status != 200:
            return Outcome(False, joined.body.decode())
        listened = await self._sent("GET", f"/gradio_api/queue/data?session_hash={session}", None)
        text = listened.body.decode()
        messages = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        ended = [one for one in messages if one["msg"] == "process_completed"]
        return Outcome(bool(ended and ended[-1]["success"]), text)

    def numbers(self, name: str) -> list[int]:
        """The listeners that run a function of this name."""
        return [number for number, one in self.blocks.fns.items() if one.name == name and one.fn]

    def event(self, name: str, trigger: str) -> int:
        """The one of them that this trigger runs."""
        fns = self.blocks.fns
        return next(n for n in self.numbers(name) if trigger in [kind for _, kind in fns[n].targets])

    def usual(self, number: int) -> list[Any]:
        """What the page would send that nobody has touched."""
        return [getattr(one, "value", None) for one in self.blocks.fns[number].inputs]
