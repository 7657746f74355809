"""What may still be taken: a container's limit counts, pages of files do not."""

from types import SimpleNamespace

import psutil
import torch

from latentloom.encoding.free_memory import free_memory

CPU = torch.device("cpu")


def test_the_cpu_has_no_more_free_than_the_machine():
    assert 0 < free_memory(CPU, []) <= psutil.virtual_memory().total


def test_a_containers_limit_less_what_it_cannot_give_back(tmp_path):
    limit, statistics = tmp_path / "memory.max", tmp_path / "memory.stat"
    limit.write_text("1000\n")
    statistics.write_text("anon 300\nfile 5000\n")
    assert free_memory(CPU, [(limit, statistics, "anon")]) == 700
    statistics.write_text("anon 1200\nfile 5000\n")
    assert free_memory(CPU, [(limit, statistics, "anon")]) == 0


def test_without_a_limit_or_a_container_the_machines_memory_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40))
    limit, statistics = tmp_path / "memory.max", tmp_path / "memory.stat"
    limit.write_text("max\n")
    statistics.write_text("anon 300\n")
    absent = tmp_path / "absent"
    assert free_memory(CPU, [(limit, statistics, "anon"), (absent, absent, "anon")]) == 2**40
