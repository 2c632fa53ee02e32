"""Shipped recipes resolve to what the golden files say; `pytest tests/config --update-golden` renews them."""

from pathlib import Path

import pytest

from nlscale.config.read import dump, read, shipped

GOLDEN = Path(__file__).parents[1] / "golden" / "config"


@pytest.mark.parametrize("recipe", shipped("recipes"))
def test_recipe_resolves_as_before(recipe: str, request: pytest.FixtureRequest) -> None:
    path, text = GOLDEN / f"{recipe}.yaml", dump(read(recipe))
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("recipe", shipped("recipes"))
def test_a_resolved_run_is_itself_a_recipe(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(read(recipe)))
    assert read(str(tmp_path / "config.yaml")) == read(recipe)
