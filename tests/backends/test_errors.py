import subprocess
import sys

import pytest

from backends.errors import UserError, did_you_mean, unknown


def test_a_near_name_is_offered():
    assert did_you_mean("optcal", ["dense", "optical"]) == " Did you mean 'optical'?"


def test_case_does_not_matter_and_the_name_is_offered_as_it_is_spelled():
    assert did_you_mean("LM_HEAD", ["lm_Head"]) == " Did you mean 'lm_Head'?"


def test_nothing_is_offered_when_nothing_is_near():
    assert did_you_mean("zebra", ["dense", "optical"]) == ""


def test_unknown_says_what_was_given_and_what_there_is():
    error = unknown("backend", "optcal", ("dense", "optical"))
    assert str(error) == "Unknown backend 'optcal'. Did you mean 'optical'? Available: dense, optical."
    assert "\n" not in str(error)


def test_unknown_with_nothing_available():
    assert str(unknown("option", "x", [])) == "Unknown option 'x'. Available: none."


def test_a_user_error_is_a_value_error():
    with pytest.raises(ValueError, match="wrong"):
        raise UserError("wrong")


def test_errors_import_no_torch():
    code = "import sys, backends.errors; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
