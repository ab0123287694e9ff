from sidecar.records.live_table import LiveTable


def test_what_is_open_is_counted_by_direction() -> None:
    table = LiveTable()
    table.enter("a", "inbound")
    table.enter("b", "outbound")
    table.enter("c", "inbound")
    assert table.open() == {"inbound": 2, "outbound": 1}
    assert table.view() == (("a", "inbound"), ("b", "outbound"), ("c", "inbound"))


def test_what_has_ended_is_forgotten() -> None:
    table = LiveTable()
    table.enter("a", "inbound")
    seen = table.view()
    table.leave("a")
    assert table.open() == {}
    assert table.view() == ()
    assert seen == (("a", "inbound"),)


def test_leaving_twice_harms_nobody() -> None:
    table = LiveTable()
    table.enter("a", "inbound")
    table.leave("a")
    table.leave("a")
    assert table.open() == {}
