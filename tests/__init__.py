import pytest

pytest.register_assert_rewrite("tests.support")  # a failed assertion of a helper shows its values too
