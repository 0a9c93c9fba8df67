//! HTTP/2 by hand, for what no client library sends.

/// Returns a frame of a stream below 256.
///
/// # Panics
/// Where the payload is too long for a frame.
pub fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).ok().filter(|length| *length < 1 << 24);
    let length = length.expect("a frame has three bytes for its length").to_be_bytes();
    [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
}

/// Returns the opening of a connection and of an image call on stream 1, whose body is to follow.
///
/// # Panics
/// Where a header is longer than 126 bytes.
pub fn opening(method: &str, authority: &str) -> Vec<u8> {
    // Headers as literals that are not indexed.
    let literal = |name: &str, value: &str| {
        let length = |text: &str| {
            let short = u8::try_from(text.len()).ok().filter(|length| *length < 127);
            short.expect("a short header")
        };
        [&[0, length(name)], name.as_bytes(), &[length(value)], value.as_bytes()].concat()
    };
    let headers = [
        literal(":method", "POST"),
        literal(":scheme", "http"),
        literal(":path", &format!("/runtime.v1.ImageService/{method}")),
        literal(":authority", authority),
        literal("content-type", "application/grpc"),
        literal("te", "trailers"),
    ];
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes.extend(frame(1, 4, 1, &headers.concat()));
    bytes
}
