# Copyright 2026 The trl_spo authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
The page of `trl-spo label`: a Gradio app that shows what a [`LabelSession`] has next, and nothing else.

Gradio can serve files, take uploads and forward requests. This page needs none of it, so what is not on a short list is not
answered, and neither is a request under another host's name, with which a foreign web page could ask.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported; nothing leaves this machine

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..label_session import LabelSession, Task, check_annotator, pair_name


PAGE = Path(__file__).parent.parent / "label_page"
SERVED = ("/assets/", "/static/", "/pair/")  # of gradio's package, and the pictures
SERVED_WHOLE = ("", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/component_server")
FONTS = ["system-ui", "sans-serif"]  # of the system, so that none is fetched


class Views:
    """
    What the page shows, as JSON. Each method is called from the page with one list of arguments.

    Args:
        session ([`LabelSession`]): of the folder.
        trouble (`Callable`): returns a sentence if no more pairs will come, and `None` otherwise.
    """

    def __init__(self, session: LabelSession, trouble: Callable[[], str | None]):
        self.session = session
        self.trouble = trouble

    def show(self, arguments: list) -> dict:
        """`[annotator]`: what comes next."""
        try:
            annotator = check_annotator(arguments[0])
        except ValueError as error:
            return _view("waiting", message=str(error), failed=True)
        return self._next(annotator)

    def click(self, arguments: list) -> dict:
        """`[annotator, task, choice]`: a decision, or `"undo"`, and what comes next."""
        name, shown, choice = arguments
        try:
            annotator = check_annotator(name)
            task = None if shown is None else Task(*shown)
            if choice == "undo":
                outcome = self.session.undo(annotator, task)
            else:
                outcome = self.session.decide(annotator, task, choice)
        except OSError as error:
            message = f"This click was not saved: {error.strerror or error}. Make room on the disk and click again."
            return self._next(annotator, message, failed=True)
        except (ValueError, TypeError) as error:
            return _view("waiting", message=f"This click was not saved: {error}", failed=True)
        return self._next(annotator, outcome.message)

    def _next(self, annotator: str, message: str = "", failed: bool = False) -> dict:
        """The first task that this annotator has not decided."""
        task = self.session.current(annotator)
        done, total = self.session.progress(annotator)
        progress = {
            "count": f"{done} of {total}",
            "percent": round(100 * done / max(total, 1), 1),
            "can_undo": done > 0,
        }
        if task is None:
            message = message or "Every answer is saved. You can close this page and stop the program."
            return _view("done", ask="Thank you.", prompt="That was the last pair.", message=message, **progress)
        progress["task"] = list(task)
        if task.index >= len(self.session.pairs):
            trouble = self.trouble()
            if trouble is not None:
                return _view("waiting", message=trouble, failed=True, **progress)
            return _view("waiting", ask="The next pair is being made ...", message=message, **progress)
        left, right = self._pictures(annotator, task)
        return _view(
            "pair",
            ask="Which picture do you like better?",
            prompt=self.session.pairs[task.index].prompt,
            left=left,
            right=right,
            next=self._coming(annotator, task),
            message=message,
            failed=failed,
            **progress,
        )

    def _pictures(self, annotator: str, task: Task) -> tuple[str, str]:
        left = self.session.left_image(annotator, task)
        return f"pair/{pair_name(task.index)}/{left}", f"pair/{pair_name(task.index)}/{1 - left}"

    def _coming(self, annotator: str, task: Task) -> list[str]:
        """Addresses of the pair after this one, which the browser reads ahead."""
        following = Task(task.index + 1, 0)
        return list(self._pictures(annotator, following)) if following.index < len(self.session.pairs) else []


def _view(state: str, **values) -> dict:
    view = {"state": state, "ask": "", "prompt": "", "task": None, "next": [], "message": "", "failed": False}
    return view | {"count": "", "percent": 0, "can_undo": False} | values


class ServedPathsOnly:
    """Middleware: what is not on the list does not exist, and the pages of other sites may not ask."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":  # and no websockets
            answer = _refusal(scope["path"], dict(scope["headers"])) or self.app
            await answer(scope, receive, send)


def _refusal(path: str, headers: dict[bytes, bytes]) -> Response | None:
    is_known = path.rstrip("/") in SERVED_WHOLE or path.startswith(SERVED)
    if not is_known or ".." in path:
        return Response("There is nothing here.", status_code=404)
    origin = headers.get(b"origin")
    if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
        return Response("Pages of other sites may not ask.", status_code=403)
    return None


def make_app(
    session: LabelSession, annotator: str, trouble: Callable[[], str | None], host: str = "127.0.0.1"
) -> FastAPI:
    """
    The web application.

    Args:
        session ([`LabelSession`]): of the folder.
        annotator (`str`): the name that a page begins with.
        trouble (`Callable`): see [`Views`].
        host (`str`, *optional*): the address that it will be reached under, beside `localhost`; `"0.0.0.0"` for any.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/pair/{name}/{side}")
    def picture(name: str, side: int):
        pair = next((pair for pair in session.pairs if pair.name == name), None)
        if pair is None or side not in (0, 1):
            return Response("There is no such picture.", status_code=404)
        return FileResponse(session.folder / pair.images[side], headers={"Cache-Control": "private, max-age=3600"})

    views = Views(session, trouble)

    def show(arguments: list) -> dict:  # gradio marks the functions that a page may call, which a method cannot be
        return views.show(arguments)

    def click(arguments: list) -> dict:
        return views.click(arguments)

    script = (PAGE / "page.js").read_text(encoding="utf-8")
    with gr.Blocks(title="trl-spo label", analytics_enabled=False) as blocks:
        gr.HTML(
            html_template=(PAGE / "page.html").read_text(encoding="utf-8"),
            js_on_load=f"const DEFAULT_ANNOTATOR = {json.dumps(annotator)};\n{script}",
            server_functions=[show, click],
            apply_default_css=False,
        )
    app = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=host,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        theme=gr.themes.Base(font=FONTS, font_mono=["monospace"]),
        css=(PAGE / "page.css").read_text(encoding="utf-8"),
    )
    app.add_middleware(ServedPathsOnly)
    if host not in ("0.0.0.0", "::"):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", host])
    return app
