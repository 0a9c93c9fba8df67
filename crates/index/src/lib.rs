//! SOCI indexes v1 and v2: discover, resolve, decode, build, convert, push.
