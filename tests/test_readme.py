"""The README's commands are what CI runs, and what it shows is true."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_opens_with_exactly_the_two_commands():
    blocks = re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert [b.strip() for b in blocks[:2]] == [
        "pip install -e . && python -m mmprefix fit --config configs/digits.yaml",
        "pip install -e '.[dev]' && pytest -n auto --dist loadfile",
    ]
    # "Opens with": nothing but a title and a sentence or two before them.
    assert README.index("```sh") < 900


def test_script_prints_them():
    for number, start in enumerate(("pip install -e . &&", "pip install -e '.[dev]' &&")):
        printed = subprocess.run(
            [sys.executable, ROOT / "scripts" / "readme_commands.py", str(number)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert printed.startswith(start)
    bad = subprocess.run(
        [sys.executable, ROOT / "scripts" / "readme_commands.py", "99"], capture_output=True, text=True
    )
    assert bad.returncode != 0


def test_ci_runs_the_readmes_commands_from_the_readme():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "readme_commands.py 0" in ci
    assert "readme_commands.py 1" in ci


def test_tree_in_the_readme_names_every_file_of_the_package():
    listed = set(re.findall(r"^ +([\w./]+\.py) ", README, flags=re.MULTILINE))
    package = ROOT / "src" / "mmprefix"
    real = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert listed == real


def test_local_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_python_example_runs(model_and_processor, photos, tmp_path, capsys):
    model, processor = model_and_processor
    (example,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    exec(example.replace("runs/digits/model", str(tmp_path)), {"image": photos[0]})
    assert capsys.readouterr().out.startswith("[")
