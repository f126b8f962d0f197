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
Teach a model your taste: a page in the browser shows two images of one prompt, and you say which one you like better.

```bash
trl-spo label --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt --output_dir my-taste
trl-spo label --dataset_name folder-of-images --output_dir my-taste
trl-spo label --output_dir my-taste                        # go on
trl-spo step-reward --dataset_name my-taste ...            # learn from it
```

Every click is on the disk before the next pair appears. The page is for this machine alone unless `--host` says otherwise.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import socket
import webbrowser
from dataclasses import dataclass, field
from pathlib import Path

from .arguments import LoadedPipelineArguments, SamplerArguments
from .errors import run
from .parser import ScriptParser
from .sampler import make_protocol


logger = logging.getLogger(__name__)

LOCAL = ("127.0.0.1", "localhost", "::1")
LOCK = ".lock"


@dataclass
class LabelArguments:
    r"""
    What to label, and for whom the page is.

    Args:
        dataset_name (`str`, *optional*):
            Pairs that are there, instead of those of the pipeline: a folder of images, a table with paths, or a preference
            dataset, whose labels are left aside.
        num_pairs (`int`, *optional*):
            How many pairs. `None`: 100 of the pipeline, or all of the dataset.
        annotator (`str`, *optional*, defaults to `"me"`):
            Name that a page begins with. It can be changed there; every annotator has an own place in the pairs.
        repeat_fraction (`float`, *optional*, defaults to `0.1`):
            Share of the pairs that everybody sees a second time, with sides swapped, to measure how sure they are.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen at. Any other than this opens the page, which asks for no password, to your network.
        port (`int`, *optional*, defaults to `7860`):
            Port to listen at. 0: any that is free.
        open_browser (`bool`, *optional*, defaults to `True`):
            Open the page in the browser of this machine.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Pairs that are there: a folder of images, a table with paths, or a dataset."}
    )
    num_pairs: int | None = field(
        default=None, metadata={"help": "How many pairs; 100 of a pipeline, all of a dataset."}
    )
    annotator: str = field(default="me", metadata={"help": "Name that a page begins with; it can be changed there."})
    repeat_fraction: float = field(
        default=0.1, metadata={"help": "Share of the pairs that come a second time, with sides swapped."}
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen at; by default for this machine alone."}
    )
    port: int = field(default=7860, metadata={"help": "Port to listen at; 0 takes any that is free."})
    open_browser: bool = field(default=True, metadata={"help": "Open the page in the browser of this machine."})

    def __post_init__(self):
        from ..label_session import check_annotator

        self.annotator = check_annotator(self.annotator)
        if self.num_pairs is not None and self.num_pairs < 1:
            raise ValueError(f"`num_pairs` must be at least 1, got {self.num_pairs}.")
        if not 0 <= self.repeat_fraction <= 1:
            raise ValueError(f"`repeat_fraction` must be in [0, 1], got {self.repeat_fraction}.")


def make_parser(prog: str | None = None) -> ScriptParser:
    """The parser whose results [`main`] takes."""
    parser = ScriptParser((LoadedPipelineArguments, SamplerArguments, LabelArguments), prog=prog)
    parser.set_defaults(output_dir="labels")
    return parser


def main(model_args: LoadedPipelineArguments, sampler_args: SamplerArguments, label_args: LabelArguments) -> Path:
    """Serves the page until it is stopped, and returns the folder."""
    from filelock import FileLock, Timeout

    # What costs nothing, before anything is loaded.
    folder = Path(sampler_args.output_dir)
    if importlib.util.find_spec("gradio") is None:
        raise SystemExit("The page needs gradio: `pip install trl-spo[label]`.")
    if sampler_args.prompts is not None and label_args.dataset_name is not None:
        raise SystemExit("--prompts and --dataset_name exclude each other: pairs are sampled, or they are there.")
    if not sampler_args.has_one_seed:
        raise SystemExit(
            f"A labelling has one --seed of at least 0, from which all others follow; got {sampler_args.seed}."
        )
    with contextlib.ExitStack() as stack:
        # The port and the folder are for one program.
        listener = stack.enter_context(listen(label_args.host, label_args.port))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(FileLock(folder / LOCK, timeout=0))
        except Timeout:
            raise SystemExit(
                f"Another `trl-spo label` is at work in {str(folder)!r}: use its page, or stop it."
            ) from None
        session, sampler = prepare(model_args, sampler_args, label_args, folder)
        if sampler is not None:
            sampler.start()
            stack.callback(sampler.stop)
        from .label_app import make_app

        app = make_app(session, label_args.annotator, lambda: sampler and sampler.trouble, label_args.host)
        serve(app, listener, label_args)
    print_ending(folder)
    return folder


def listen(host: str, port: int) -> socket.socket:
    """
    A socket at an address.

    Raises:
        SystemExit: if somebody else listens there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was just stopped is no hindrance
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SystemExit(
            f"The page cannot be served at {host}, port {port}: {error.strerror}. Choose another --port; 0 takes any."
        ) from None
    return listener


def prepare(model_args, sampler_args, label_args, folder: Path):
    """The session of a folder, and the thread that samples for it, if its pairs are sampled and some are missing."""
    from ..evaluation.protocols import protocol_of_pipeline
    from ..label_session import LabelSession
    from .label_pairs import PairSampler, copy_pairs, open_folder, prompt_order

    seed = 0 if sampler_args.seed is None else sampler_args.seed[0]
    if sampler_args.prompts is not None:
        prompts = prompt_order(list(sampler_args.read_prompts()), label_args.num_pairs or 100, seed)
        protocol = make_protocol(sampler_args.protocol, dataclasses.replace(sampler_args, seed=None), model_args)
        open_folder(folder, {**sampling_settings(model_args, sampler_args, protocol), "seed": seed})
        session = LabelSession(folder, len(prompts), label_args.repeat_fraction, seed)
        if len(session.pairs) >= len(prompts):
            return session, None
        pipeline = sampler_args.place(model_args.load_pipeline())
        sampler = protocol_of_pipeline(protocol, pipeline).sampler()
        options = (seed, sampler_args.batch_size, sampler, session.add_pair)
        return session, PairSampler(folder, pipeline, prompts, *options)
    if label_args.dataset_name is not None:
        dataset, columns = existing_pairs(label_args.dataset_name, label_args.num_pairs)
        open_folder(folder, {"dataset": label_args.dataset_name, "seed": seed})
        copy_pairs(folder, dataset, columns)
        return LabelSession(folder, len(dataset), label_args.repeat_fraction, seed), None
    stored = open_folder(folder, {})
    session = LabelSession(folder, 0, label_args.repeat_fraction, stored["seed"])
    session.num_pairs = min(len(session.pairs), label_args.num_pairs or len(session.pairs))
    return session, None


def sampling_settings(model_args, sampler_args, protocol) -> dict:
    """What decides the images, for `label.json`."""
    settings = {"model": model_args.model_name_or_path, "vae": model_args.vae_name_or_path, "lora": sampler_args.lora}
    settings |= {"prompts": sampler_args.prompts, "dtype": model_args.dtype, "sampler": protocol.settings()}
    return settings | ({"lora_scale": sampler_args.lora_scale} if sampler_args.lora is not None else {})


def existing_pairs(name: str, num_pairs: int | None):
    """The dataset of pairs behind a name, and its columns."""
    from ..preference_dataset import find_preference_columns, leave_undecoded
    from .data import load_pairs

    dataset = leave_undecoded(load_pairs(name))
    if num_pairs is not None:
        dataset = dataset.select(range(min(num_pairs, len(dataset))))
    return dataset, find_preference_columns(dataset.column_names)


def serve(app, listener: socket.socket, label_args: LabelArguments) -> None:
    """Answers until Ctrl-C."""
    import uvicorn

    host = f"[{label_args.host}]" if ":" in label_args.host else label_args.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    if label_args.host not in LOCAL:
        logger.warning(
            "Everybody who reaches %s can see the images and add labels: the page asks for no password.", address
        )
    listener.listen(128)  # from here on a browser that comes at once waits instead of being turned away
    print(f"Label at {address}  (Ctrl-C ends; every click is already saved)", flush=True)
    if label_args.open_browser:
        with contextlib.suppress(Exception):  # a server without a desktop
            webbrowser.open(address)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    with contextlib.suppress(KeyboardInterrupt):  # raised again after an orderly end
        uvicorn.Server(config).run(sockets=[listener])


def print_ending(folder: Path) -> None:
    """What there is now, and what to do with it."""
    from ..label_folder import label_rows, read_clicks, valid_clicks

    clicks = valid_clicks(read_clicks(folder))
    rows = label_rows(folder)
    ties = sum(row["label_0"] == 0.5 for row in rows)
    print(f"{len(clicks)} decisions on {len(rows)} labelled pairs in {folder}, {ties} of them without a preference.")
    print(f"Look: trl-spo data preview {folder}\nLearn: trl-spo step-reward --dataset_name {folder}")


if __name__ == "__main__":
    run(main, make_parser())
