"""Shared by the full-size checks: two processes, as hosts of a cluster."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def optimised(as_users_compile):
    """Full-size programs run long enough, and their time and memory are what is looked at."""


@pytest.fixture(scope="session")
def run_hosts():
    """A function: arguments of Python -> what two processes print that may join by `join_hosts`."""

    def run(*arguments: str) -> list[str]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        given = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        hosts = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env=os.environ | given | {"JAX_PROCESS_ID": str(index), "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,  # where Python finds the packages
            )
            for index in range(2)
        ]
        try:
            printed = [host.communicate(timeout=900)[0] for host in hosts]
        finally:
            for host in hosts:
                host.kill()
        assert [host.returncode for host in hosts] == [0, 0], "\n".join(printed)
        return printed

    return run
