"""The reason and error codes that metrics know by name.

A code is a label, and a label must not grow with what peers send; so a code that is not here is counted as "other", while the
access log has it in full. A test finds each code that can end a connection, an exchange or a question and compares.
"""

from __future__ import annotations

_CONNECTION = """
    certificate_expired certificate_missing certificate_not_yet_valid certificate_purpose certificate_refused
    authority_unknown cipher_refused handshake_aborted handshake_failed handshake_timeout identity_missing not_tls
    refused_by_peer tls_version_refused
    anchor_foreign peer_rejected peer_unexpected session_resumed svid_ext_key_usage svid_ext_malformed
    svid_id_malformed svid_is_ca svid_key_usage svid_malformed svid_many_uris svid_missing_uri svid_not_spiffe
    trust_domain_unknown
    connections_exhausted drain_timeout evicted draining exchange_aborted idle_timeout no_bytes peer_connections_exceeded
    keepalive_timeout plaintext_refused
    peer_no_longer_trusted reset_by_peer
    h2_cancel h2_compression_error h2_connect_error h2_enhance_your_calm h2_flow_control_error h2_frame_size_error
    h2_http_1_1_required h2_inadequate_security h2_internal_error h2_no_error h2_protocol_error h2_refused_stream
    h2_settings_timeout h2_stream_closed
"""

_REQUEST = """
    authority_malformed authority_mismatch body_malformed body_timeout coding_unsupported connect_unsupported
    connection_malformed connection_nominates_protected expectation_failed framing_ambiguous head_control_character
    head_incomplete head_malformed head_timeout head_too_large head_too_many_fields header_ambiguous
    header_name_malformed header_repeated header_value_malformed host_mismatch host_missing host_repeated
    length_malformed length_mismatch loop_detected method_malformed rate_limited request_line_too_long
    request_malformed request_overridden route_missing scheme_mismatch tunnel_unsupported version_unsupported
    path_backslash path_character path_control path_encoding_invalid path_escape_doubled path_escape_malformed
    path_escapes_root path_not_ascii path_segment_disguised path_slash_encoded path_whitespace
    query_control query_encoding_invalid query_escape_malformed query_name_ambiguous query_name_missing
    query_not_ascii query_semicolon query_too_long query_whitespace
    target_form_invalid target_fragment
"""

_SIDECAR = """
    cancelled client_gone exchange_idle identity_unusable internal_error message_aborted overloaded peer_exchanges_exceeded route_timeout sidecar_unavailable
    decision_broken_off decision_malformed decision_timeout decision_too_large decision_unaskable
    decision_unavailable decision_undefined decision_unproven decision_unreachable decision_unsupported
    policy_not_ready policy_stale
    decision_status_400 decision_status_401 decision_status_404 decision_status_500 decision_status_503
"""

_UPSTREAM = """
    answer_timeout answer_too_large plaintext_refused_after_proof upstream_broke_off upstream_connect_timeout upstream_failed
    upstream_handshake_timeout upstream_malformed upstream_no_answer upstream_not_tls upstream_protocol
    upstream_draining upstream_ended upstream_refused upstream_refused_stream upstream_reset
    upstream_overloaded upstream_streams_exhausted upstream_unreachable upstream_unresolved
    upgrade_malformed upgrade_refused upgrade_unsupported
"""

_FLEET = """
    bundle_from_future bundle_not_taken content_malformed content_too_large fleet_archive_conflict fleet_bundle_missing
    fleet_bundle_unknown fleet_path_unknown fleet_serial_mismatch fleet_serial_taken fleet_state_unavailable
    fleet_store_unavailable label_malformed media_type_unsupported method_not_allowed query_malformed
    rollout_conflict rollout_malformed rollout_not_seen rollout_outrun
"""

CODES = frozenset(f"{_CONNECTION} {_REQUEST} {_SIDECAR} {_UPSTREAM} {_FLEET}".split())

NONE = "none"
OTHER = "other"


def label(code: str | None) -> str:
    """The value of a label for a code: one of `CODES`, "none" or "other"."""
    if code is None:
        return NONE
    return code if code in CODES else OTHER
