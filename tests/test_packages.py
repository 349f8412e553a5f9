"""The two import packages, and the name under which training used to live."""

import pytest

import kconvert_qat


def test_the_old_name_of_the_training_package_says_where_it_went():
    with pytest.warns(DeprecationWarning, match="kconvert.qat is kconvert_qat now"):
        from kconvert.qat import QATConfig
    assert QATConfig is kconvert_qat.QATConfig
