"""A registered encoder behind ``mlflow models serve``, asked over HTTP; and the same model without a server."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import hjepa
from hjepa.export import ExportedEncoder
from tests.test_registry import Shelf, evaluation

TOLERANCE = 1e-5
Ask = Callable[[Any], tuple[int, Any]]


@pytest.fixture(scope="module")
def shelf(stack_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        shelf = Shelf(tmp_path_factory.mktemp("served"))
        shelf.register("1", evaluation(0.8))
        yield shelf


@pytest.fixture(scope="module")
def encoder(shelf: Shelf) -> ExportedEncoder:
    return hjepa.load_encoder(f"models:/{shelf.name}@champion")


@pytest.fixture(scope="module")
def pyfunc(shelf: Shelf) -> Any:
    return mlflow.pyfunc.load_model(f"models:/{shelf.name}@champion")


def pictures() -> np.ndarray:
    """uint8 [3, 40, 36]."""
    return np.random.default_rng(0).integers(0, 256, (3, 40, 36), dtype=np.uint8)


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG")
    return buffer.getvalue()


def embedded(encoder: ExportedEncoder, images: np.ndarray, level: int | str = "all") -> np.ndarray:
    last = images if images.ndim == 4 else images[..., None]
    return encoder.embed_images(torch.tensor(last).permute(0, 3, 1, 2), level).numpy()


# -- without a server --------------------------------------------------------------------------------------------------


def test_pyfunc__bytes_base64_and_arrays_give_the_embeddings_of_load_encoder(
    pyfunc: Any, encoder: ExportedEncoder
) -> None:
    wanted = embedded(encoder, pictures())
    files = [png(picture) for picture in pictures()]
    texts = [base64.encodebytes(file).decode() for file in files]  # with line breaks, as MIME has them
    objects = np.empty(3, dtype=object)
    objects[:] = files
    for given in (
        pictures(),
        pictures().astype(object),
        objects,
        pd.DataFrame({"image": files}),
        pd.DataFrame({"image": texts}),
    ):
        got = pyfunc.predict(given)
        assert (got.dtype, got.shape) == (np.float32, wanted.shape)
        assert np.abs(got - wanted).max() <= TOLERANCE


def test_pyfunc__jpeg_in_colour_is_decoded_as_pillow_does(pyfunc: Any, encoder: ExportedEncoder) -> None:
    colour = np.random.default_rng(1).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    pixels = np.array(Image.open(io.BytesIO(jpeg(colour))))
    got = pyfunc.predict(pd.DataFrame({"image": [jpeg(colour)]}))
    assert np.abs(got - embedded(encoder, pixels[None])).max() <= TOLERANCE


def test_pyfunc__every_level_at_once_is_one_array_for_each(pyfunc: Any, encoder: ExportedEncoder) -> None:
    found = pyfunc.predict(pictures(), params={"level": "every"})
    assert list(found) == ["0", "1"]
    for level in (0, 1):
        assert np.abs(found[str(level)] - embedded(encoder, pictures(), level)).max() <= TOLERANCE


def _objects(*values: Any) -> np.ndarray:
    column = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        column[index] = value
    return column


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (_objects(png(pictures()[0]), png(pictures()[0])[:60]), "image 1 cannot be decoded"),
        (_objects(b"no image"), "image 0 cannot be decoded .* not-an-image"),
        (_objects(b""), "image 0 cannot be decoded .* empty"),
        (_objects("not base64!"), "image 0 is text, but not an image file in base64"),
        (_objects([[0, 256], [0, 0]]), "image 0: expected uint8 pixels, whole numbers from 0 to 255"),
        (_objects([[0.5, 0.5], [0.0, 0.0]]), "image 0: expected uint8 pixels"),
        (_objects([[float("nan"), 1.0], [0.0, 0.0]]), "image 0: expected uint8 pixels"),
        (_objects([[1, 2], [3]]), "image 0 is no rectangle of pixels"),
        (_objects(None), "image 0 is of type NoneType"),
        (np.zeros((2, 8, 8, 4), np.uint8), "1 or 3 colour channels"),
        (np.zeros((2, 8, 8), np.float32), "expected uint8 images"),
        (np.zeros((2, 0, 8), np.uint8), "expected uint8 images"),
    ],
)
def test_pyfunc__wrong_input_says_which_image_and_why(pyfunc: Any, given: np.ndarray, message: str) -> None:
    with pytest.raises(mlflow.MlflowException, match=message) as caught:
        pyfunc.predict(given)
    assert caught.value.get_http_status_code() == 400


# -- with one ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ask(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Posts JSON to /invocations of a served model; returns status and answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--workers", "1"]
    command += ["--model-uri", f"models:/{shelf.name}@champion", "--host", "127.0.0.1", "--port", str(port)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PATH": path}, start_new_session=True
        )

    def post(body: Any) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            data=body if isinstance(body, bytes) else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield post
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # it keeps nothing, and takes ten seconds to end in peace
        server.wait(30)


def test_serve__arrays_and_files_over_http_give_the_embeddings_of_load_encoder(
    ask: Ask, encoder: ExportedEncoder
) -> None:
    wanted = embedded(encoder, pictures())
    texts = [base64.b64encode(png(picture)).decode() for picture in pictures()]
    for body in (
        {"inputs": pictures().tolist()},
        {"instances": pictures().tolist()},
        {"inputs": {"image": texts}},
        {"inputs": texts},
        {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
        {"dataframe_records": [{"image": text} for text in texts]},
    ):
        status, answer = ask(body)
        assert status == 200, answer
        got = np.array(answer["predictions"], np.float32)
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= TOLERANCE


def test_serve__levels_over_http(ask: Ask, encoder: ExportedEncoder) -> None:
    status, answer = ask({"inputs": pictures().tolist(), "params": {"level": "every"}})
    assert (status, list(answer["predictions"])) == (200, ["0", "1"])
    _, one = ask({"inputs": pictures().tolist(), "params": {"level": "1"}})
    assert one["predictions"] == answer["predictions"]["1"]
    assert np.abs(np.array(one["predictions"]) - embedded(encoder, pictures(), 1)).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": [base64.b64encode(png(pictures()[0])[:60]).decode()]}, "image 0 cannot be decoded (60 bytes)"),
        ({"dataframe_split": {"columns": ["image"], "data": [["AAAA"]]}}, "image 0 cannot be decoded"),
        ({"inputs": [[[0, 300], [0, 0]]]}, "whole numbers from 0 to 255"),
        ({"inputs": pictures().tolist(), "params": {"level": "7"}}, "expected one of all, mean, 0, 1, every"),
        ({"dataframe_split": {"columns": ["photo"], "data": [["AAAA"]]}}, "image"),
        (b"{", "valid JSON"),
    ],
)
def test_serve__wrong_input_is_answered_with_400_and_the_reason(ask: Ask, body: Any, message: str) -> None:
    status, answer = ask(body)
    assert status == 400
    assert message in answer["message"]
