//! containerd's image records.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use soci_oci::Descriptor;

use super::{Containerd, MAX_MESSAGE, label_mask, system_time};
use crate::StoreError;
use crate::proto::services::images::v1 as wire;
use crate::proto::services::images::v1::images_client::ImagesClient;

/// An image record: a name for a target, and a root of the garbage collector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its name, as a reference.
    pub name: String,
    /// The manifest or index it names.
    pub target: Descriptor,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// When the record was made.
    pub created: Option<SystemTime>,
}

/// containerd's image service.
#[derive(Debug, Clone)]
pub struct Images {
    containerd: Containerd,
    client: ImagesClient<tonic::transport::Channel>,
}

impl Images {
    pub(super) fn new(containerd: Containerd) -> Self {
        let client = ImagesClient::new(containerd.channel.clone()).max_decoding_message_size(MAX_MESSAGE);
        Self { containerd, client }
    }

    /// Returns the image record `name`, or `None` when there is none.
    ///
    /// # Errors
    /// When containerd cannot say.
    pub async fn get(&self, name: &str) -> Result<Option<Image>, StoreError> {
        let request = self.containerd.request(wire::GetImageRequest { name: name.to_owned() })?;
        let mut client = self.client.clone();
        match self.containerd.within("reading image", name, client.get(request)).await {
            Ok(answer) => answer.into_inner().image.map(|image| decode("reading image", image)).transpose(),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns all image records of the namespace; one whose target is not readable is left out.
    ///
    /// # Errors
    /// When containerd cannot say.
    pub async fn list(&self) -> Result<Vec<Image>, StoreError> {
        let request = self.containerd.request(wire::ListImagesRequest { filters: Vec::new() })?;
        let mut client = self.client.clone();
        let answer = self.containerd.within("listing", "images", client.list(request)).await?;
        let images = answer.into_inner().images.into_iter();
        Ok(images
            .filter_map(|image| {
                decode("listing", image)
                    .inspect_err(|error| tracing::debug!(%error, "image record left out"))
                    .ok()
            })
            .collect())
    }

    /// Creates the image record `name` for `target`.
    ///
    /// # Errors
    /// [`StoreError::Exists`] when there is one of that name, or when containerd refuses.
    pub async fn create(
        &self,
        name: &str,
        target: &Descriptor,
        labels: &[(String, String)],
    ) -> Result<Image, StoreError> {
        let image = encode(name, target, labels)?;
        let request = self.containerd.request(wire::CreateImageRequest { image: Some(image) })?;
        let mut client = self.client.clone();
        let answer = self.containerd.within("creating image", name, client.create(request)).await?;
        decode("creating image", answer.into_inner().image.unwrap_or_default())
    }

    /// Merges `labels` into those of the image record `name`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is none of that name, or when containerd refuses.
    pub async fn label(&self, name: &str, labels: &[(String, String)]) -> Result<(), StoreError> {
        if labels.is_empty() {
            return Ok(());
        }
        let image = wire::Image {
            name: name.to_owned(),
            labels: labels.iter().cloned().collect::<HashMap<_, _>>(),
            // The mask leaves it alone, but containerd 2.x reads it first and dies of a request without one.
            target: Some(crate::proto::types::Descriptor::default()),
            ..wire::Image::default()
        };
        self.update("labelling image", image, label_mask(labels)).await
    }

    /// Makes the image record `name` name another `target`; labels stay.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is none of that name, or when containerd refuses.
    pub async fn retarget(&self, name: &str, target: &Descriptor) -> Result<(), StoreError> {
        let image = encode(name, target, &[])?;
        let mask = prost_types::FieldMask { paths: vec!["target".to_owned()] };
        self.update("updating image", image, mask).await
    }

    /// Makes `name` name `target`, whether or not there is such a record already.
    ///
    /// # Errors
    /// When containerd refuses.
    pub async fn set(&self, name: &str, target: &Descriptor) -> Result<(), StoreError> {
        match self.create(name, target, &[]).await {
            Err(StoreError::Exists(_)) => self.retarget(name, target).await,
            other => other.map(|_| ()),
        }
    }

    async fn update(
        &self,
        action: &'static str,
        image: wire::Image,
        mask: prost_types::FieldMask,
    ) -> Result<(), StoreError> {
        let name = image.name.clone();
        let message = wire::UpdateImageRequest { image: Some(image), update_mask: Some(mask) };
        let request = self.containerd.request(message)?;
        let mut client = self.client.clone();
        self.containerd.within(action, &name, client.update(request)).await.map(|_| ())
    }
}

fn encode(name: &str, target: &Descriptor, labels: &[(String, String)]) -> Result<wire::Image, StoreError> {
    let size = i64::try_from(target.size).map_err(|_| StoreError::Protocol {
        action: "writing image",
        what: name.to_owned(),
        found: format!("target of {} bytes", target.size),
    })?;
    Ok(wire::Image {
        name: name.to_owned(),
        labels: labels.iter().cloned().collect(),
        target: Some(crate::proto::types::Descriptor {
            media_type: target.media_type.clone(),
            digest: target.digest.to_string(),
            size,
            annotations: target.annotations.clone().into_iter().collect(),
        }),
        ..wire::Image::default()
    })
}

fn decode(action: &'static str, image: wire::Image) -> Result<Image, StoreError> {
    let wire::Image { name, labels, target, created_at, .. } = image;
    let malformed = |found: String| StoreError::Protocol { action, what: name.clone(), found };
    let target = target.ok_or_else(|| malformed("an image without target".to_owned()))?;
    let digest = target.digest.parse().map_err(|error| malformed(format!("its target: {error}")))?;
    let size =
        u64::try_from(target.size).map_err(|_| malformed(format!("a target of {} bytes", target.size)))?;
    let mut descriptor = Descriptor::new(target.media_type, digest, size);
    descriptor.annotations = target.annotations.into_iter().collect();
    Ok(Image {
        target: descriptor,
        labels: labels.into_iter().collect(),
        created: system_time(created_at),
        name,
    })
}
