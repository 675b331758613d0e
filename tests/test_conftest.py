"""What every other test may rely on."""

import socket

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from lechat_jax.model.mask import window_mask


def test_a_shape_that_contradicts_its_annotation_is_refused_in_tests() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="k_pos"):
        window_mask(jnp.zeros((1, 3), int), jnp.zeros(3, int), 2)


def test_a_test_cannot_reach_another_machine() -> None:
    with socket.socket() as outward, pytest.raises(ConnectionRefusedError, match="mark it"):
        outward.connect(("192.0.2.1", 80))  # reserved for documentation, RFC 5737
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_a_test_has_eight_devices_and_single_precision() -> None:
    assert (jax.device_count(), jnp.zeros(1).dtype) == (8, jnp.float32)


@pytest.mark.usefixtures("x64")
def test_a_test_may_ask_for_double_precision() -> None:
    assert jnp.zeros(1).dtype == jnp.float64
