"""Take what natlib made elsewhere: networks as plain values or ONNX, genotypes as text or picture.

    python -m natlib.export DARTS darts.svg                      # a published genotype, drawn
    python -m natlib.export my_cell.json my_cell.txt             # as the literal that DARTS prints
    python -m natlib.export runs/train/KEY/record.json net.pt    # a trained network, one file
    python -m natlib.export net.pt net.onnx                      # for other runtimes

Images go in as ``natlib.data.normalise`` gives them, with mean and deviation of the images that
the network was trained on.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from natlib import genotype as genotypes
from natlib import macro as macros
from natlib import zoo
from natlib.errors import NatlibError
from natlib.files import replacing
from natlib.genotype import Genotype, format_darts
from natlib.network import CellNetwork
from natlib.records import as_json, read_record

OPSET = 18
"""The version of ONNX's operators that ``to_onnx`` writes."""

_CLASSES = {
    name: value
    for module in (genotypes, macros)
    for name, value in vars(module).items()
    if isinstance(value, type) and is_dataclass(value)
}
_GENOTYPES, _NETWORKS = (".json", ".txt", ".svg", ".png"), (".pt", ".onnx")


def _restore(value: Any) -> Any:
    """Rebuild what ``records.as_json`` made of genotypes and macros; raises NatlibError."""
    if isinstance(value, list):
        return tuple(map(_restore, value))
    if not isinstance(value, Mapping):
        return value
    try:
        return _CLASSES[value["type"]](**{k: _restore(v) for k, v in value.items() if k != "type"})
    except (KeyError, TypeError) as error:
        raise NatlibError(
            f"{value.get('type')!r} with {sorted(value)} is none of {', '.join(_CLASSES)} ({error})"
        ) from None


def _require_standalone(network: CellNetwork) -> Genotype:
    """Return the genotype of a network whose output depends on the image alone."""
    if network.genotype is None or network.shared:
        raise NatlibError(
            "only a standalone network with batch norms of its own can be exported: a supernet "
            "normalises by each batch's statistics, so train the genotype from scratch first"
        )
    return network.genotype


def _checksum(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _place(path: Path | str) -> Path:
    """Return a file's path; raise NatlibError where its folder is missing."""
    path = Path(path)
    if not path.parent.is_dir():
        raise NatlibError(f"{path}: there is no folder {path.parent}")
    return path


def save_network(network: CellNetwork, path: Path | str) -> None:
    """Write a standalone network to one file that ``torch.load(path, weights_only=True)`` reads.

    It holds a dict: "natlib_network" (1, the form's version), "description" (JSON of genotype and
    macro), "weights" (the plain state of the module: tensors by name, on the CPU; what only
    training needs, such as an auxiliary head, is left out) and "checksum" (SHA-256 of the weights'
    names and bytes). Written whole or not at all. Raises NatlibError for a supernet and for shared
    batch norms.
    """
    genotype, path = _require_standalone(network), _place(path)
    description = {"genotype": genotype.to_json(), "macro": as_json(network.macro)}
    names = CellNetwork(network.macro, genotype=genotype, device="meta").state_dict()
    state = network.state_dict()
    weights = {name: state[name].cpu() for name in names}
    content = {
        "natlib_network": 1,
        "description": json.dumps(description),
        "weights": weights,
        "checksum": _checksum(weights),
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load_network(path: Path | str) -> CellNetwork:
    """Rebuild the network that ``save_network`` wrote, on the CPU and in evaluation mode.

    Raises NatlibError, naming the file, if it is missing, corrupt, no such file, or if its weights
    are not those of its genotype and macro.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise NatlibError(f"there is no file {path}") from None
    except Exception as error:  # what is no such file fails in torch.load in many ways
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise NatlibError(f"{path} cannot be read ({why}): export it again") from error
    match content:
        case {
            "natlib_network": 1,
            "description": str(text),
            "weights": dict(weights),
            "checksum": str(checksum),
        } if all(isinstance(value, Tensor) for value in weights.values()):
            pass
        case _:
            raise NatlibError(
                f"{path} is no network of this natlib: it must hold natlib_network = 1, "
                "description, weights and checksum"
            )
    if _checksum(weights) != checksum:
        raise NatlibError(f"{path} is corrupt (its checksum differs): export it again")
    try:
        described = json.loads(text)
        genotype = Genotype.from_json(described["genotype"])
        network = CellNetwork(_restore(described["macro"]), genotype=genotype)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise NatlibError(f"{path} describes no network: {error!r}") from error
    expected = {name: value.shape for name, value in network.state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    if differ := sorted(dict(expected.items() ^ found.items())):
        raise NatlibError(
            f"{path} contradicts itself: {len(differ)} of its weights are not those of its "
            f"genotype and macro, the first {differ[0]}"
        )
    network.load_state_dict(weights)
    return network.eval()


def to_onnx(network: CellNetwork, path: Path | str) -> None:
    """Write a standalone network as ONNX, opset ``OPSET``, in evaluation mode, one file.

    Input "images", float32 (batch, image_channels, H, W), normalised; output "logits", (batch,
    classes); the batch may have any size. The file's metadata hold genotype and macro as JSON.
    Raises NatlibError for a supernet and for shared batch norms, and if a package is missing.
    """
    genotype, path = _require_standalone(network), _place(path)
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise NatlibError(
            f"ONNX export needs {' and '.join(missing)}, which is not installed: "
            "pip install -c constraints.txt -e '.[onnx]'"
        )
    macro = network.macro
    plain = copy.deepcopy(network).cpu().eval()
    images = torch.zeros(2, macro.image_channels, macro.image_size, macro.image_size)
    with torch.no_grad():
        program = torch.onnx.export(
            plain,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["natlib"] = json.dumps(
        {"genotype": genotype.to_json(), "macro": as_json(macro)}
    )
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)


def save_genotype(genotype: Genotype, path: Path | str) -> None:
    """Write a genotype in the form that the name's ending says, whole or not at all.

    ``.json``: natlib JSON; ``.txt``: the literal that DARTS prints; ``.svg``, ``.png``: its cells
    drawn. ``genotype.read`` reads the first two. Raises NatlibError for another ending.
    """
    path = _place(path)
    if path.suffix in (".svg", ".png"):
        from natlib.drawing import draw_genotype

        chart = draw_genotype(genotype)
        content = chart.svg().encode() if path.suffix == ".svg" else chart.png()
    elif path.suffix == ".json":
        content = (json.dumps(genotype.to_json()) + "\n").encode()
    elif path.suffix == ".txt":
        content = (format_darts(genotype) + "\n").encode()
    else:
        raise NatlibError(f"{path}: a genotype goes to a file *{', *'.join(_GENOTYPES)}")
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def trained(path: Path) -> CellNetwork:
    """Return the network that a record's training gave, in evaluation mode; ``path`` is its JSON.

    Raises NatlibError if there is no such record, it is of another kind, or its weights are gone.
    """
    if not path.is_file():
        raise NatlibError(f"there is no file {path}")
    record = read_record(path)
    if record.kind not in ("train", "imagenet"):
        raise NatlibError(
            f"{path} is a record of kind {record.kind!r}; a network is in 'train' and 'imagenet'"
        )
    config = record.config
    network = CellNetwork(_restore(config["macro"]), genotype=_restore(config["genotype"]))
    weights = record.load("weights")
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    return network.eval()


def convert(source: str, target: Path) -> None:
    """Write ``source`` to ``target`` in the form that the target's ending says.

    ``source`` is a published genotype's name, a genotype's file, a network's file ``*.pt``, or the
    ``record.json`` of a trained network, or its folder. Raises NatlibError if the one cannot become
    the other.
    """
    path = Path(source)
    if (path / "record.json").is_file():
        path /= "record.json"
    network = load_network(path) if path.suffix == ".pt" else None
    if path.name == "record.json":
        network = trained(path)
    if network is not None and target.suffix == ".onnx":
        to_onnx(network, target)
    elif network is not None and target.suffix == ".pt":
        save_network(network, target)
    elif target.suffix in _NETWORKS:
        raise NatlibError(
            f"{source} is a genotype, which has no weights: a network comes from a *.pt file or "
            "from the record.json of a training"
        )
    elif network is not None:
        save_genotype(_require_standalone(network), target)
    else:
        named = source in zoo.ZOO or not (path.suffix or path.exists())
        save_genotype(zoo.get(source) if named else genotypes.read(path), target)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m natlib.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="genotype (name or file), *.pt, or a training's record.json")
    parser.add_argument("target", type=Path, help=f"*{', *'.join((*_GENOTYPES, *_NETWORKS))}")
    given = parser.parse_args()
    try:
        convert(given.source, given.target)
    except (NatlibError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {given.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
