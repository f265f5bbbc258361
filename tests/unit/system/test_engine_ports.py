"""Ports that engines draw before they listen on them."""

from megatron_vespo.system.ports import PORT_LANES, PORT_RANGE, find_free_port


def test_engines_of_a_run_draw_different_ports():
    """24 that draw from all of 1,000 would collide in one run of four."""
    for _ in range(20):
        ports = [find_free_port("127.0.0.1", number) for number in range(24)]
        assert len(set(ports)) == 24 and set(ports) <= set(PORT_RANGE)


def test_numbers_beyond_the_lanes_have_ports_too():
    lanes = {find_free_port("127.0.0.1", number) % PORT_LANES for number in (3, PORT_LANES + 3)}
    assert len(lanes) == 1
