"""`sfd doctor` names what is usable and, for the rest, the command that would install it."""

from sfd_fast.commands import doctor


def test_every_group_has_something_usable_here():
    rows = doctor.rows(doctor.DoctorConfig())
    for group in ("kernels", "attention", "optimizer", "data", "launcher"):
        assert any(row.usable for row in rows if row.group == group)


def test_a_missing_package_comes_with_its_install_command(monkeypatch):
    monkeypatch.setattr(doctor, "has_module", lambda name: False)
    row = next(row for row in doctor.data_rows() if row.name == "DALI")
    assert (row.usable, row.detail, row.install) == (False, "not installed", "pip install 'sfd-fast[dali]'")


def test_the_page_names_every_row(capsys):
    doctor.run_doctor(doctor.DoctorConfig())
    out = capsys.readouterr().out
    assert all(row.name in out for row in doctor.rows(doctor.DoctorConfig()))
    assert "Triton" in out


def test_a_failed_build_of_the_cpu_kernels_is_shown(monkeypatch):
    import sfd_kernels

    served = {"cpu": "reference (plain PyTorch); g++: command not found", "cuda": "Triton 3.7.1"}
    monkeypatch.setattr(sfd_kernels, "backends", lambda: served)
    row = doctor.kernel_rows()[0]
    assert not row.usable
    assert "g++: command not found" in row.detail
    assert row.install
