"""A file imports only from floors below its own, read from the sources: the plan of docs/architecture.md."""

import ast
from pathlib import Path

import mmprefix

ROOT = Path(mmprefix.__file__).parent
FLOORS = {
    "mmprefix": -1, "errors": -1, "files": -1, "instructions": 0,
    "sequence": 0, "masks": 0, "vision": 0, "metrics": 0, "varlen": 0, "onednn": 0, "arguments": 0,
    "four_bit": 1, "packing": 1, "loss": 1, "attention": 1,
    "last_layer": 2, "stored_weights": 2, "decoder": 2, "data": 2,
    "generation": 3, "prefix_lm": 3, "probe": 3,
    "conversion": 4, "modeling": 4, "processing": 4, "prompts": 3, "adapters": 4, "accounting": 4, "decoding": 4, "places": 4,
    "training": 5, "evaluation": 5, "interop": 5, "scaling": 5,
    "commands": 6, "caching": 6, "prepare": 6, "scoring": 6, "inspection": 6, "doctor": 6, "reporting": 6, "cli": 6, "__main__": 7,
}  # fmt: skip
# On one floor, the right-hand side may be used by the left: sequence before masks, packing before attention, ...
SAME_FLOOR = {
    ("masks", "sequence"), ("attention", "packing"), ("decoder", "last_layer"), ("decoder", "stored_weights"),
    ("stored_weights", "last_layer"), ("prefix_lm", "generation"), ("probe", "generation"), ("probe", "prefix_lm"),
    ("decoding", "modeling"), ("decoding", "places"), ("places", "modeling"), ("processing", "modeling"), ("adapters", "modeling"), ("accounting", "modeling"),
    ("accounting", "adapters"),
    ("interop", "training"), ("scaling", "training"), ("training", "evaluation"),
    ("caching", "commands"), ("cli", "inspection"), ("cli", "doctor"), ("cli", "commands"), ("cli", "caching"),
}  # fmt: skip


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "mmprefix"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module in (
                "mmprefix",
                "mmprefix.data",
                "mmprefix.metrics",
            ):  # `from mmprefix import cli` imports a module, too
                yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__")
            else:
                yield node.module


def edges():
    """(importing module, imported module) inside the package."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(("mmprefix", *(p for p in parts if p != "__init__")))
        if module == "mmprefix":
            continue  # its lazy names reach everywhere, for type checkers only
        for name in imports(path):
            if name.split(".")[0] == "mmprefix":
                yield module, name


def test_every_room_has_a_floor():
    rooms = {
        p.stem if p.is_file() else p.name for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert rooms - {"__init__"} == set(FLOORS) - {"mmprefix"}


def test_no_import_runs_upwards():
    found = list(edges())
    assert len(found) > 50, "the reader of imports must see them"
    for module, imported in found:
        a, b = room(module), room(imported)
        assert a == b or FLOORS[b] < FLOORS[a] or (a, b) in SAME_FLOOR, f"{module} imports {imported}"


def test_data_and_model_do_not_know_each_other():
    for module, imported in edges():
        known = ({"data", "decoder"}, {"data", "modeling"}, {"data", "processing"}, {"data", "prompts"})
        assert {room(module), room(imported)} not in known


def test_no_circles():
    graph = {}
    for module, imported in edges():
        graph.setdefault(module, set()).add(imported)
    done, path = set(), []

    def visit(module):
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module in done:
            return
        path.append(module)
        for imported in graph.get(module, ()):
            if imported != "mmprefix":
                visit(imported)
        path.pop()
        done.add(module)

    for module in list(graph):
        visit(module)
