"""What is bent in the h2 library, where a conversation does not show it: what a peer can make us remember."""

from __future__ import annotations

import struct

from h2.errors import ErrorCodes

from sidecar.wire.h2_protocol import Protocol
from support.h2_frames import GET, PREFACE, Peer, RstStreamFrame, SettingsFrame


def server() -> Protocol:
    protocol = Protocol(client=False, max_header_bytes=61440, max_streams=100, window=1024 * 1024)
    protocol.receive_data(PREFACE + SettingsFrame(0).serialize())
    protocol.data_to_send()
    return protocol


def test_unknown_settings_are_not_remembered():
    protocol = server()
    known = len(protocol.remote_settings)
    for start in range(0x100, 0x8000, 0x400):
        body = b"".join(struct.pack(">HL", code, 1) for code in range(start, start + 0x400))
        protocol.receive_data(len(body).to_bytes(3, "big") + b"\4\0\0\0\0\0" + body)
    assert len(protocol.remote_settings) == known


def test_closed_streams_are_forgotten_in_time():
    protocol, peer = server(), Peer()
    for stream_id in range(1, 6001, 2):
        reset = RstStreamFrame(stream_id, error_code=ErrorCodes.CANCEL)
        protocol.receive_data(peer.head(stream_id, GET, end=True).serialize() + reset.serialize())
        protocol.forget(stream_id)
    assert len(protocol.streams) == 0
    assert len(protocol._closed_streams) == 1000


def test_first_bytes_tell_the_limits():
    protocol = Protocol(client=False, max_header_bytes=1234, max_streams=56, window=1024 * 1024)
    peer = Peer()
    assert peer.settings_of(protocol.data_to_send()) == {
        SettingsFrame.HEADER_TABLE_SIZE: 4096,
        SettingsFrame.ENABLE_PUSH: 0,
        SettingsFrame.INITIAL_WINDOW_SIZE: 65535,
        SettingsFrame.MAX_FRAME_SIZE: 16384,
        SettingsFrame.ENABLE_CONNECT_PROTOCOL: 1,
        SettingsFrame.MAX_HEADER_LIST_SIZE: 1234,
        SettingsFrame.MAX_CONCURRENT_STREAMS: 56,
    }


def test_window_is_given_back_before_it_runs_out():
    """However little was used: with the rest held by bodies that nobody reads, it may be all that is left."""
    protocol = server()
    manager = protocol._inbound_flow_control_window_manager
    manager.current_window_size = 100
    protocol.credit(99)
    assert protocol.pending == 0
    protocol.credit(1)
    assert protocol.pending > 0
    assert manager.current_window_size == 200
