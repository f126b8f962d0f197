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
The folder of `trl-spo sample`: images that are there as soon as they are made, and `samples.json`, which says of every image
how it was made. Images of an earlier call stay, and so does what was written about them.
"""

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from ..training.checkpointing import write_picture, write_text


RECORD_NAME = "samples.json"
NUMBERED = re.compile(r"(\d{5,})_.*\.png")


class SampleFolder:
    """
    A folder that fills with images.

    Args:
        path (`str` or `Path`): made if it does not exist.

    Raises:
        ValueError: if it has a `samples.json` that something else wrote.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.earlier = self._read_earlier()
        numbers = [int(match[1]) for file in self.path.glob("*.png") if (match := NUMBERED.fullmatch(file.name))]
        self.first = max(numbers, default=-1) + 1
        self.record: dict[str, Any] = {}
        self.images: list[dict[str, Any]] = []

    def _read_earlier(self) -> list[dict[str, Any]]:
        """What earlier calls wrote about images that still exist, the oldest first."""
        file = self.path / RECORD_NAME
        if not file.is_file():
            return []
        try:
            last = json.loads(file.read_text(encoding="utf-8"))
            runs = [*last.pop("earlier", []), last]
            for run in runs:
                run["images"] = [image for image in run["images"] if (self.path / image["file"]).is_file()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(file)!r} was not written by `trl-spo sample`, and would be overwritten. Choose another --output_dir."
            ) from error
        return [run for run in runs if run["images"]]

    def start(self, record: dict[str, Any]) -> None:
        """Begins with the settings that all images of this call share."""
        self.record = record
        self.path.mkdir(parents=True, exist_ok=True)
        self.save()

    def add(self, picture: Image.Image, prompt: str, seed: int, values: dict[str, Any], slug: str = "") -> Path:
        """
        Writes an image.

        Args:
            picture (`PIL.Image.Image`): the image.
            prompt (`str`), seed (`int`): what it was made from.
            values (`dict`): what sets it apart from the settings of the call.
            slug (`str`, *optional*): the same for the name of the file.
        """
        name = f"{self.first + len(self.images):05d}_seed{seed}{slug}.png"
        write_picture(picture, self.path / name)
        self.images.append({"file": name, "prompt": prompt, "seed": seed, **values})
        return self.path / name

    def save(self) -> None:
        """Writes `samples.json`, in which all images of the folder are listed."""
        record = {**self.record, "images": self.images}
        if self.earlier:
            record["earlier"] = self.earlier
        write_text(self.path / RECORD_NAME, json.dumps(record, indent=2) + "\n")

    def add_grid(self, sheet: Image.Image) -> Path:
        """Writes a sheet of images, `grid.png` if there is none yet, and never over another."""
        path = self.path / "grid.png"
        number = self.first
        while path.exists():
            path = self.path / f"grid_{number:05d}.png"
            number += 1
        write_picture(sheet, path)
        self.record.setdefault("grids", []).append(path.name)
        return path
