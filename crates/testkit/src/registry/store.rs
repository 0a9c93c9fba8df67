//! What the registry holds: content by digest, and per repository which blobs, manifests and tags it knows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use crate::http::Content;

/// Content and names. With a root directory uploads go to files, else to memory.
#[derive(Debug)]
pub(crate) struct Store {
    root: Option<PathBuf>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    content: BTreeMap<String, Content>,
    repositories: BTreeMap<String, Repository>,
    uploads: BTreeMap<String, Upload>,
    next: u64,
}

#[derive(Debug, Default)]
struct Repository {
    blobs: BTreeSet<String>,
    /// Digest to media type.
    manifests: BTreeMap<String, String>,
    tags: BTreeMap<String, String>,
}

/// A manifest as it is served.
#[derive(Debug, Clone)]
pub(crate) struct StoredManifest {
    pub(crate) digest: String,
    pub(crate) media_type: String,
    pub(crate) content: Content,
}

#[derive(Debug)]
struct Upload {
    sink: Sink,
    hasher: Sha256,
    len: u64,
}

#[derive(Debug)]
enum Sink {
    Memory(Vec<u8>),
    File(File, PathBuf),
}

/// Returns the digest of `bytes`, `sha256:…`.
pub(crate) fn digest(bytes: &[u8]) -> String {
    named(Sha256::new_with_prefix(bytes))
}

fn named(hasher: Sha256) -> String {
    let mut text = String::from("sha256:");
    for byte in hasher.finalize() {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

impl Store {
    pub(crate) fn new(root: Option<PathBuf>) -> io::Result<Self> {
        if let Some(root) = &root {
            fs::create_dir_all(root)?;
        }
        Ok(Self { root, inner: Mutex::default() })
    }

    pub(crate) fn put_blob(&self, repository: &str, bytes: Bytes) -> String {
        let digest = digest(&bytes);
        self.insert(repository, &digest, Content::Memory(bytes));
        digest
    }

    /// Serves a file as it is; it must not change.
    pub(crate) fn put_file(&self, repository: &str, path: &Path) -> io::Result<(String, u64)> {
        let mut file = File::open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut len = 0;
        loop {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            hasher.update(buffer.get(..count).unwrap_or_default());
            len += count as u64;
        }
        let digest = named(hasher);
        self.insert(repository, &digest, Content::File(Arc::new(file), len));
        Ok((digest, len))
    }

    fn insert(&self, repository: &str, digest: &str, content: Content) {
        let mut inner = self.inner.lock();
        inner.content.insert(digest.to_owned(), content);
        inner.repositories.entry(repository.to_owned()).or_default().blobs.insert(digest.to_owned());
    }

    pub(crate) fn blob(&self, repository: &str, digest: &str) -> Option<Content> {
        let inner = self.inner.lock();
        inner.repositories.get(repository)?.blobs.get(digest)?;
        inner.content.get(digest).cloned()
    }

    /// Any content, whatever repository it is in: what storage serves.
    pub(crate) fn content(&self, digest: &str) -> Option<Content> {
        self.inner.lock().content.get(digest).cloned()
    }

    pub(crate) fn mount(&self, repository: &str, from: &str, digest: &str) -> bool {
        let mut inner = self.inner.lock();
        let known = inner.repositories.get(from).is_some_and(|from| from.blobs.contains(digest));
        if known {
            inner.repositories.entry(repository.to_owned()).or_default().blobs.insert(digest.to_owned());
        }
        known
    }

    pub(crate) fn delete_blob(&self, repository: &str, digest: &str) -> bool {
        self.inner.lock().repositories.get_mut(repository).is_some_and(|found| found.blobs.remove(digest))
    }

    pub(crate) fn knows(&self, repository: &str) -> bool {
        self.inner.lock().repositories.contains_key(repository)
    }

    pub(crate) fn put_manifest(
        &self,
        repository: &str,
        reference: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> String {
        let digest = digest(&bytes);
        let mut inner = self.inner.lock();
        inner.content.insert(digest.clone(), Content::Memory(bytes));
        let found = inner.repositories.entry(repository.to_owned()).or_default();
        found.manifests.insert(digest.clone(), media_type.to_owned());
        if !reference.contains(':') {
            found.tags.insert(reference.to_owned(), digest.clone());
        }
        digest
    }

    pub(crate) fn manifest(&self, repository: &str, reference: &str) -> Option<StoredManifest> {
        let inner = self.inner.lock();
        let found = inner.repositories.get(repository)?;
        let digest = if reference.contains(':') { reference } else { found.tags.get(reference)? };
        let media_type = found.manifests.get(digest)?.clone();
        let content = inner.content.get(digest)?.clone();
        Some(StoredManifest { digest: digest.to_owned(), media_type, content })
    }

    pub(crate) fn manifests(&self, repository: &str) -> Vec<StoredManifest> {
        let inner = self.inner.lock();
        let Some(found) = inner.repositories.get(repository) else { return Vec::new() };
        found
            .manifests
            .iter()
            .filter_map(|(digest, media_type)| {
                let content = inner.content.get(digest)?.clone();
                Some(StoredManifest { digest: digest.clone(), media_type: media_type.clone(), content })
            })
            .collect()
    }

    pub(crate) fn delete_manifest(&self, repository: &str, reference: &str) -> bool {
        let mut inner = self.inner.lock();
        let Some(found) = inner.repositories.get_mut(repository) else { return false };
        if reference.contains(':') {
            found.tags.retain(|_, digest| digest != reference);
            found.manifests.remove(reference).is_some()
        } else {
            found.tags.remove(reference).is_some()
        }
    }

    pub(crate) fn tags(&self, repository: &str) -> Option<Vec<String>> {
        let inner = self.inner.lock();
        Some(inner.repositories.get(repository)?.tags.keys().cloned().collect())
    }

    pub(crate) fn start_upload(&self) -> io::Result<String> {
        let mut inner = self.inner.lock();
        inner.next += 1;
        let id = format!("upload-{}", inner.next);
        let sink = match &self.root {
            None => Sink::Memory(Vec::new()),
            Some(root) => {
                let path = root.join(&id);
                let file =
                    OpenOptions::new().create(true).truncate(true).write(true).read(true).open(&path)?;
                Sink::File(file, path)
            }
        };
        inner.uploads.insert(id.clone(), Upload { sink, hasher: Sha256::new(), len: 0 });
        Ok(id)
    }

    /// Returns how much of an upload is there.
    pub(crate) fn upload_len(&self, id: &str) -> Option<u64> {
        self.inner.lock().uploads.get(id).map(|upload| upload.len)
    }

    pub(crate) fn append(&self, id: &str, bytes: &[u8]) -> io::Result<u64> {
        let mut inner = self.inner.lock();
        let upload = inner.uploads.get_mut(id).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        match &mut upload.sink {
            Sink::Memory(memory) => memory.extend_from_slice(bytes),
            Sink::File(file, _) => file.write_all(bytes)?,
        }
        upload.hasher.update(bytes);
        upload.len += bytes.len() as u64;
        Ok(upload.len)
    }

    /// Ends an upload; the content is kept if it has the digest `expected`, else dropped.
    pub(crate) fn finish_upload(&self, repository: &str, id: &str, expected: &str) -> io::Result<bool> {
        let upload = self.inner.lock().uploads.remove(id);
        let upload = upload.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let digest = named(upload.hasher);
        if digest != expected {
            return Ok(false);
        }
        let content = match upload.sink {
            Sink::Memory(memory) => Content::Memory(Bytes::from(memory)),
            Sink::File(file, path) => {
                let kept = path.with_file_name(digest.replace(':', "-"));
                fs::rename(&path, &kept)?;
                Content::File(Arc::new(file), upload.len)
            }
        };
        self.insert(repository, &digest, content);
        Ok(true)
    }

    pub(crate) fn cancel_upload(&self, id: &str) -> bool {
        self.inner.lock().uploads.remove(id).is_some()
    }
}
