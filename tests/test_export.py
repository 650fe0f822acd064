"""Networks and genotypes that leave natlib: plain values, ONNX, text, pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from natlib import NatlibError, export
from natlib.data import normalise
from natlib.genotype import Cell, Edge, Genotype, read
from natlib.handcrafted import MACROS, ORIGINALS
from natlib.macro import Macro, MacroConfig
from natlib.network import CellNetwork
from natlib.primitives import ALL_PRIMITIVES
from natlib.train import TrainConfig, splits, train_standalone
from natlib.zoo import ZOO
from tests import made
from tests.strategies import chain, generator

# A normal cell and two reducing ones, so that both strides occur.
MACRO = MacroConfig(channels=8, cells=3, classes=5, image_size=16, stem=1)
SMALL = Genotype(chain("sep_conv_3x3", "null", "skip_connect"), chain("conv_1x1", "max_pool_3x3"))
EVERY = Cell(tuple(Edge(1, 2, p) for p in ALL_PRIMITIVES), (2,))
"""Every primitive, at stride 1 in a normal cell and at stride 2 in a reduction cell."""


def network(genotype: Genotype = SMALL, macro: Macro = MACRO) -> CellNetwork:
    """A network with running statistics and affine parameters that are not the initial ones."""
    built, draw = CellNetwork(macro, genotype=genotype), generator(1)
    with torch.no_grad():
        for name, value in built.state_dict().items():
            if value.ndim == 1:
                low = 0.5 if name.endswith(("variance", "weight")) else -0.2
                value.copy_(low + 0.4 * torch.rand(value.shape, generator=draw))
    return built.eval()


def images(count: int, seed: int = 0, macro: Macro = MACRO) -> torch.Tensor:
    shape = (count, macro.image_channels, macro.image_size, macro.image_size)
    return torch.randn(shape, generator=generator(seed))


# ONNX ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["every primitive", "DARTS", "NAONet", "NATv2_VGG"])
def test_onnxruntime_computes_the_same_logits_for_any_batch(name: str, tmp_path: Path) -> None:
    genotype = Genotype(EVERY, EVERY) if name == "every primitive" else ZOO[name]
    ours, file = network(genotype), tmp_path / "net.onnx"
    export.to_onnx(ours, file)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 2, 7):
        x = images(count, seed=count)
        with torch.no_grad():
            expected = ours(x).numpy()
        (found,) = session.run(["logits"], {"images": x.numpy()})
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", export.OPSET)]
    (metadata,) = model.metadata_props
    assert Genotype.from_json(json.loads(metadata.value)["genotype"]) == genotype
    # Exporting leaves nothing behind that natlib's own operations would stumble over.
    CellNetwork(MACRO, genotype=genotype)(images(2)).sum().backward()


def test_onnx_holds_plain_operations_and_another_macro(tmp_path: Path) -> None:
    macro = MacroConfig(channels=4, cells=3, classes=3, image_size=8, image_channels=1)
    pools = chain("max_pool_3x3", "avg_pool_5x5", "dil_conv_3x3", "skip_connect")
    export.to_onnx(network(Genotype(pools, pools), macro), tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert {"MaxPool", "AveragePool", "Conv"} <= kinds
    assert not kinds & {"ScatterND", "Loop", "If", "Transpose"}
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim[1:]] == [1, 8, 8]


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_what_to_install(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(NatlibError, match=rf"needs {package}, which .*pip install .*\[onnx\]"):
        export.to_onnx(network(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [export.to_onnx, export.save_network])
def test_what_depends_on_the_batch_is_not_exported(
    write: Callable[[CellNetwork, Path], None], tmp_path: Path
) -> None:
    supernet = CellNetwork(MACRO, nodes=2, primitives=["conv_1x1", "null"])
    for shared in (supernet, CellNetwork(MACRO, genotype=SMALL, shared=True)):
        with pytest.raises(NatlibError, match=r"only a standalone network .* from scratch first"):
            write(shared, tmp_path / "net")
    assert not list(tmp_path.iterdir())


# Plain values --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DARTS", "NAONet"])
def test_a_saved_network_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    ours, file = network(ZOO[name]), tmp_path / "net.pt"
    export.save_network(ours, file)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt"]
    again = export.load_network(file)
    assert (again.genotype, again.macro, again.training) == (ZOO[name], MACRO, False)
    assert torch.equal(again(images(3)), ours(images(3)))
    content = torch.load(file, weights_only=True)
    described = json.loads(content["description"])
    assert Genotype.from_json(described["genotype"]) == ZOO[name]
    assert described["macro"]["channels"] == 8
    plain = CellNetwork(MACRO, genotype=ZOO[name])
    plain.load_state_dict(content["weights"])


@pytest.mark.parametrize("name", ["ResNet20", "MobileNetV2"])
def test_hand_crafted_networks_are_saved_too(name: str, tmp_path: Path) -> None:
    macro, file = MACROS[name, "CIFAR-10"], tmp_path / "net.pt"
    ours = network(ORIGINALS[name], macro)
    export.save_network(ours, file)
    again, x = export.load_network(file), images(1, macro=macro)
    assert again.macro == macro and torch.equal(again(x), ours(x))


def test_what_only_training_needs_stays_behind(tmp_path: Path) -> None:
    macro = replace(MACRO, image_size=32)
    trained = CellNetwork(macro, genotype=SMALL, auxiliary=True).eval()
    export.save_network(trained, tmp_path / "net.pt")
    again, x = export.load_network(tmp_path / "net.pt"), images(1, macro=macro)
    assert not [n for n in again.state_dict() if n.startswith("auxiliary")]
    assert torch.equal(again(x), trained(x))


def test_a_record_without_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NatlibError, match=r"there is no file .*record\.json"):
        export.convert(str(tmp_path / "record.json"), tmp_path / "net.pt")
    record = made.run(tmp_path, "other", MACRO, lambda run: {"accuracy": 0.5})
    with pytest.raises(NatlibError, match=r"kind 'other'; a network is in 'train'"):
        export.convert(str(record.path), tmp_path / "net.pt")


def test_a_file_that_was_there_stays_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "net.pt"
    export.save_network(network(), file)
    before = file.read_bytes()

    def fail(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export.save_network(network(ZOO["VGG"]), file)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("how", ["absent", "empty", "text", "truncated", "altered"])
def test_a_corrupt_file_is_named(how: str, tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    export.save_network(network(), file)
    content = file.read_bytes()
    if how == "absent":
        file.unlink()
    elif how == "altered":
        # A byte of a weight.
        weight = network().classifier.weight.detach().numpy().tobytes()
        place = content.index(weight)
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        changed = {"empty": b"", "text": b"hello", "truncated": content[: len(content) // 2]}
        file.write_bytes(changed[how])
    with pytest.raises(NatlibError, match=r"net\.pt"):
        export.load_network(file)


def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    export.save_network(network(), file)
    good = torch.load(file, weights_only=True)
    description = json.loads(good["description"])
    weights = good["weights"]

    def refused(message: str, **changes: Any) -> None:
        content = {**good, **changes}
        content["checksum"] = export._checksum(content["weights"])
        torch.save(content, file)
        with pytest.raises(NatlibError, match=rf"net\.pt {message}"):
            export.load_network(file)

    def described(**changes: Any) -> str:
        return json.dumps({**description, **changes})

    refused(r"is no network of this natlib: .*natlib_network = 1", natlib_network=2)
    other = described(genotype=ZOO["DARTS"].to_json())
    refused(r"contradicts itself: \d+ of its weights", description=other)
    macro = description["macro"]
    other = described(macro={**macro, "classes": 9})
    refused(r"contradicts itself: 2 .*the first classifier\.bias", description=other)
    less = {k: v for k, v in weights.items() if k != "classifier.bias"}
    refused(r"contradicts itself: 1 .*classifier\.bias", weights=less)
    more = {**weights, "spare": torch.zeros(2)}
    refused(r"contradicts itself: 1 .*spare", weights=more)
    other = described(macro={**macro, "depth": 9})
    refused(r"describes no network: .*'MacroConfig' with .*depth", description=other)
    other = described(macro={**macro, "type": "Path"})
    refused(r"describes no network: .*'Path' .* is none of .*MacroConfig", description=other)
    refused(r"describes no network", description=described(macro=None))
    refused(r"describes no network", description="{")
    for wrong in (weights, {**good, "weights": {"classifier.bias": 3}}):
        torch.save(wrong, file)
        with pytest.raises(NatlibError, match="is no network of this natlib"):
            export.load_network(file)


# Genotypes and the command -------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".json", ".txt"])
def test_a_written_genotype_is_read_back(ending: str, tmp_path: Path) -> None:
    for genotype in (*ZOO.values(), Genotype(EVERY, EVERY)):
        export.save_genotype(genotype, tmp_path / f"cell{ending}")
        assert read(tmp_path / f"cell{ending}") == genotype


def test_a_genotype_is_drawn(tmp_path: Path) -> None:
    for ending in ("svg", "png"):
        export.save_genotype(ZOO["NAONet"], tmp_path / f"cell.{ending}")
        first = (tmp_path / f"cell.{ending}").read_bytes()
        export.save_genotype(ZOO["NAONet"], tmp_path / f"cell.{ending}")
        assert (tmp_path / f"cell.{ending}").read_bytes() == first
    assert b"<svg" in (tmp_path / "cell.svg").read_bytes()
    picture = Image.open(BytesIO(first)).convert("L")
    assert min(picture.size) > 600 and len(picture.getcolors() or []) > 20
    with pytest.raises(NatlibError, match=r"cell\.pdf: .*\.json, \*\.txt, \*\.svg, \*\.png"):
        export.save_genotype(ZOO["NAONet"], tmp_path / "cell.pdf")


@pytest.mark.usefixtures("made_images")
def test_a_training_becomes_one_file_with_its_accuracy(tmp_path: Path) -> None:
    macro = replace(MACRO, classes=len(made.CLASSES), image_size=8)
    config = TrainConfig(made.DATA, macro, SMALL, seed=0, epochs=1, batch=16)
    record = made.run(tmp_path, "train", config, train_standalone)
    export.convert(str(record.path), tmp_path / "net.pt")
    again, parts = export.load_network(tmp_path / "net.pt"), splits(made.DATA)
    x = normalise(parts.test.raw, parts.mean, parts.std)
    with torch.no_grad():
        right = (again(x).argmax(1) == parts.test.labels).float().mean()
    assert float(right) == pytest.approx(record.result["test_accuracy"])
    export.convert(str(tmp_path / "net.pt"), tmp_path / "cell.json")
    assert read(tmp_path / "cell.json") == SMALL


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "natlib.export", *map(str, arguments)],
        capture_output=True, text=True, cwd=Path(export.__file__).parent.parent,
    )  # fmt: skip


def test_the_command_converts_and_says_what_it_cannot(tmp_path: Path) -> None:
    done = command("DARTS", tmp_path / "cell.txt")
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'cell.txt'}\n")
    assert read(tmp_path / "cell.txt") == ZOO["DARTS"]
    done = command("DARTS", tmp_path / "net.onnx")
    assert done.returncode == 1 and done.stderr.startswith("error: DARTS is a genotype, which has")
    done = command("DARTZ", tmp_path / "cell.txt")
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown genotype 'DARTZ'; allowed are DARTS, ENAS,")
