"""What Ray warns of reaches the user: in plain words, once in a while, and nothing else."""

from influencespace.engine.ray_warnings import RayWarnings

SPILLED = ":info_message:Spilled {} MiB, 17 objects, write throughput 400 MiB/s. Set RAY_verbose_spill_logs=0 to disable this."
KILLED = (
    "[2026-11-29 18:00:00,123 E 99 99] (raylet) node_manager.cc:3000: 3 Workers (tasks / actors) killed due to memory pressure "
    "(OOM), 0 Workers crashed due to other reasons at node (ID: 12ab, IP: 10.0.0.2) over the last time period."
)
FULL = (
    "[2026-11-29 18:00:00,123 E 99 99] (raylet) file_system_monitor.cc:116: /tmp/ray/session_1 is over 95% full, "
    "available space: 12.3 GB; capacity: 900 GB. Object creation will fail if spilling is required."
)


def heard(*batches: dict[str, object]) -> list[str]:
    said: list[str] = []
    listen = RayWarnings(said.append)
    for batch in batches:
        listen(batch)
    return said


def test_what_a_user_can_mend_is_said_in_plain_words() -> None:
    lines = [SPILLED.format(2048), KILLED, FULL, "[W] some other line of Ray", "a traceback"]
    spilled, killed, full = heard({"pid": "raylet", "is_err": True, "lines": lines})
    assert spilled.startswith(
        "Ray's memory for objects is full on a machine: 2048 MiB in all were put on its disk"
    )
    assert killed.startswith("Ray ended 3 worker(s), as a machine's memory was nearly full")
    assert "/tmp/ray/session_1 on a machine of Ray is over 95 % full, 12.3 GB are free" in full
    assert all("\n" not in line and len(line) <= 300 for line in (spilled, killed, full))


def test_what_workers_write_is_not_taken_for_a_warning_and_other_lines_do_no_harm() -> None:
    assert (
        heard({"pid": 4321, "lines": [KILLED]}, {}, {"pid": "raylet"}, {"pid": "raylet", "lines": [None]})
        == []
    )
    text = "Warning: The following resource request cannot be scheduled right now: {'GPU': 1.0}."
    (line,) = heard({"pid": "autoscaler", "lines": ["Resized to 8 CPUs.", text]})
    assert line.startswith("Ray's autoscaler says: The following resource request cannot be scheduled")


def test_what_goes_on_is_said_less_and_less() -> None:
    said = heard(*({"pid": "raylet", "lines": [SPILLED.format(number)]} for number in range(1, 1001)))
    assert [line.split()[9] for line in said] == [str(2**i) for i in range(10)]
