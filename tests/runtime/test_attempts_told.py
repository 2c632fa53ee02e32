"""Whose logs `nlscale logs` gives."""

from pathlib import Path

from nlscale_launch.logs import Follower

from nlscale.runtime.folder import Folder


def test_a_start_that_was_refused_does_not_hide_the_one_that_trains(tmp_path: Path) -> None:
    for attempt in ("1", "2", "3"):
        (tmp_path / "logs" / attempt).mkdir(parents=True)
    for rank in (0, 1):
        (tmp_path / "logs" / "2" / f"rank-{rank:05d}.log").write_text(f"rank {rank} speaks\n")
    (tmp_path / "logs" / "1" / "rank-00000.log").write_text("long ago\n")
    folder = Folder(tmp_path)
    assert list(Follower(folder).new()) == ["2/rank 0 | rank 0 speaks"]
    assert [label for label, _ in Follower(folder, "all").sources()] == ["2/rank 0", "2/rank 1"]
    assert list(Follower(folder, attempt=1).new()) == ["1/rank 0 | long ago"]
    assert Follower(folder, attempt=3).sources() == []
