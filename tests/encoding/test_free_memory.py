"""What may still be taken: a container's limit counts, pages of files do not."""

import psutil
import torch

from latentloom.encoding.free_memory import container_allowances, free_memory


def test_the_cpu_has_no_more_free_than_the_machine():
    assert 0 < free_memory(torch.device("cpu")) <= psutil.virtual_memory().total


def test_a_containers_limit_less_what_it_cannot_give_back(tmp_path):
    limit, statistics = tmp_path / "memory.max", tmp_path / "memory.stat"
    limit.write_text("1000\n")
    statistics.write_text("anon 300\nfile 5000\n")
    assert container_allowances([(limit, statistics, "anon")]) == [700]
    statistics.write_text("anon 1200\nfile 5000\n")
    assert container_allowances([(limit, statistics, "anon")]) == [0]


def test_no_limit_and_no_container_allow_anything(tmp_path):
    limit, statistics = tmp_path / "memory.max", tmp_path / "memory.stat"
    limit.write_text("max\n")
    statistics.write_text("anon 300\n")
    absent = tmp_path / "absent"
    assert container_allowances([(limit, statistics, "anon"), (absent, absent, "anon")]) == []
