//! The few fields of CRI messages that are read, by their numbers in the CRI protocol (the same in v1 and v1alpha2).
//!
//! The messages are decoded from a copy; what is forwarded are the bytes as they came.

use bytes::{Buf, Bytes};
use prost::Message;

#[derive(Clone, PartialEq, Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<AuthConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct AuthConfig {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
    #[prost(string, tag = "3")]
    auth: String,
    #[prost(string, tag = "4")]
    server_address: String,
    #[prost(string, tag = "5")]
    identity_token: String,
    #[prost(string, tag = "6")]
    registry_token: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodSandboxMetadata>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxMetadata {
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

#[derive(Clone, PartialEq, Message)]
struct RemoveImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

/// What a pull says that matters here.
pub(super) struct Pull {
    /// The image as the caller names it.
    pub(super) image: String,
    /// Namespace of the pod, empty when unknown.
    pub(super) namespace: String,
    /// The credential fields, if the request has any.
    pub(super) auth: Option<soci_auth::keychain::cri::AuthConfig>,
}

/// Why a message cannot be read. It is forwarded all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unread {
    /// It is compressed, which no caller of CRI does.
    Compressed,
    /// It is cut, not alone, or no message of this kind.
    Malformed,
}

/// Returns the payload of the only gRPC message in `body`.
fn message(body: &Bytes) -> Result<Bytes, Unread> {
    let mut rest = body.clone();
    if rest.remaining() < 5 {
        return Err(Unread::Malformed);
    }
    if rest.get_u8() != 0 {
        return Err(Unread::Compressed);
    }
    let len = rest.get_u32() as usize;
    if rest.len() == len { Ok(rest) } else { Err(Unread::Malformed) }
}

fn decode<M: Message + Default>(body: &Bytes) -> Result<M, Unread> {
    M::decode(message(body)?).map_err(|_| Unread::Malformed)
}

/// Reads a `PullImage` request.
pub(super) fn pull(body: &Bytes) -> Result<Pull, Unread> {
    let request: PullImageRequest = decode(body)?;
    let auth = request.auth.map(|auth| {
        soci_auth::keychain::cri::AuthConfig::new(
            auth.username,
            auth.password,
            auth.auth,
            auth.server_address,
            auth.identity_token,
            auth.registry_token,
        )
    });
    Ok(Pull {
        image: request.image.ok_or(Unread::Malformed)?.image,
        namespace: request
            .sandbox
            .and_then(|sandbox| sandbox.metadata)
            .map(|pod| pod.namespace)
            .unwrap_or_default(),
        auth,
    })
}

/// Reads the image id that a successful `PullImage` answers.
pub(super) fn pulled(body: &Bytes) -> Option<String> {
    let response: PullImageResponse = decode(body).ok()?;
    (!response.image_ref.is_empty()).then_some(response.image_ref)
}

/// Reads the image, by reference or id, that a `RemoveImage` request names.
pub(super) fn removed(body: &Bytes) -> Result<String, Unread> {
    let request: RemoveImageRequest = decode(body)?;
    request.image.map(|image| image.image).ok_or(Unread::Malformed)
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, BytesMut};

    use super::*;

    fn framed(message: &impl Message) -> Bytes {
        let mut body = BytesMut::new();
        body.put_u8(0);
        body.put_u32(u32::try_from(message.encoded_len()).unwrap());
        message.encode(&mut body).unwrap();
        body.freeze()
    }

    #[test]
    fn a_pull_names_image_namespace_and_auth() {
        let request = PullImageRequest {
            image: Some(ImageSpec { image: "reg.example/a".into() }),
            auth: Some(AuthConfig { username: "u".into(), password: "p".into(), ..AuthConfig::default() }),
            sandbox: Some(PodSandboxConfig { metadata: Some(PodSandboxMetadata { namespace: "ns".into() }) }),
        };
        let pull = pull(&framed(&request)).unwrap();
        assert_eq!((pull.image.as_str(), pull.namespace.as_str()), ("reg.example/a", "ns"));
        assert!(pull.auth.is_some());
    }

    #[test]
    fn what_cannot_be_read_is_told_from_what_can() {
        let good = framed(&RemoveImageRequest { image: Some(ImageSpec { image: "sha256:x".into() }) });
        assert_eq!(removed(&good).as_deref(), Ok("sha256:x"));
        for cut in 0..good.len() {
            assert_eq!(removed(&good.slice(..cut)), Err(Unread::Malformed));
        }
        let mut compressed = BytesMut::from(&good[..]);
        compressed[0] = 1;
        assert_eq!(removed(&compressed.freeze()), Err(Unread::Compressed));
        let garbage = Bytes::from_static(&[0, 0, 0, 0, 2, 0xff, 0xff]);
        assert_eq!(pull(&garbage).err(), Some(Unread::Malformed));
    }
}
