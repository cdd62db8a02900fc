"""What is said where nodes do not meet, or have not the same in their folders."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.console import EXIT_PEER_LOST, RankError, UserError
from pipeline.formats.base_model import read_base
from pipeline.formats.fingerprint import fingerprint
from pipeline.training.nodes import meeting
from pipeline.training.run.train import check_same_on_nodes
from tests.helpers.builders import save_model
from tests.helpers.warm import free_port


@pytest.fixture
def one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the second of two nodes with a process each."""
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "1"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)


def test_a_connection_that_does_not_come_names_the_interfaces(
    one_of_two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setattr(meeting, "CONNECT_S", 0.5)
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    with pytest.raises(RankError) as caught:
        meeting.launchers_store()
    assert caught.value.exit_code == EXIT_PEER_LOST
    assert f"(address of the first: 127.0.0.1:{port})" in str(caught.value)
    assert "export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0" in str(caught.value)
    assert "Here GLOO_SOCKET_IFNAME = eth7, NCCL_SOCKET_IFNAME = not set" in str(caught.value)


def test_what_one_fails_in_ends_those_that_wait_for_it(one_of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))
    store.set(meeting.ATTEMPT, "this attempt ")
    with pytest.raises(UserError), meeting.telling(store):
        raise UserError("datasets: there is no file there")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RankError, match=r"rank 1 has ended on .*: datasets: there is no file there"):
        meeting.join(store, "gloo", 2)


def test_another_model_or_other_data_on_a_node_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By some of its values, whatever the folder is called; the node is named."""
    for name, seed in (("here", 0), ("there", 1)):
        save_model(tmp_path / name, "llama", layers=1, seed=seed)
    there: dict[str, str] = {}
    place: Any = SimpleNamespace(over_nodes=True)

    def gather(everyone: list[Any], own: Any) -> None:
        everyone[:] = [own, ("node-b", there)]

    monkeypatch.setattr(meeting.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(meeting.dist, "all_gather_object", gather)
    for model, order, refused in (
        ("here", "1", None),
        ("there", "1", "the model's folder is another on node-b"),
        ("here", "2", "the training data is another on node-b"),
    ):
        there.clear()
        there.update(
            {"the model's folder": fingerprint(read_base(tmp_path / model, "model")), "the training data": order}
        )
        if refused is None:
            check_same_on_nodes(place, tmp_path / "here", "1")
        else:
            with pytest.raises(UserError, match=refused):
                check_same_on_nodes(place, tmp_path / "here", "1")
