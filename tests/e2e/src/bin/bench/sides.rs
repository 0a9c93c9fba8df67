//! Who is measured, and the images and the registry that all of them share.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use soci_e2e::binaries::Binaries;
use soci_e2e::publish::{BUILD, Published};
use soci_e2e::stage::{Backstage, PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, rootfs};
use soci_testkit::AuthMode;
use soci_testkit::image::{Dialect, Image};

/// Binaries under one name.
#[derive(Debug)]
pub(crate) struct Side {
    pub(crate) name: &'static str,
    pub(crate) binaries: Binaries,
}

impl Side {
    pub(crate) fn all(peer: Option<&Path>) -> Result<Vec<Self>> {
        let mut sides = vec![Self { name: "ours", binaries: Binaries::ours()? }];
        if let Some(directory) = peer {
            sides.push(Self { name: "peer", binaries: Binaries::at(directory)? });
        }
        Ok(sides)
    }
}

/// An image in the registry, with its index.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) image: Image,
    pub(crate) published: Published,
}

/// What all samples share.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) backstage: Backstage,
    images: BTreeMap<&'static str, Ready>,
}

/// Size of the large file of `big`.
pub(crate) const LARGE: usize = 629_145_600;

type Layers = fn() -> Result<Vec<soci_testkit::layer_gen::Layer>>;

const IMAGES: &[(&str, &[&str], Layers)] = &[
    ("big", &["index", "big", "read"], || Ok(vec![rootfs::debian()?, rootfs::one_file(LARGE)?])),
    ("files10k", &["files10k"], || Ok(vec![rootfs::debian()?, rootfs::many_files(10_000)?])),
    ("files100k", &["files100k"], || Ok(vec![rootfs::debian()?, rootfs::many_files(100_000)?])),
    ("py", &["py"], || Ok(vec![rootfs::debian()?, rootfs::python()?])),
];

impl Bench {
    /// Makes the images that the wanted parts need, and their indexes by our command line.
    pub(crate) fn prepare(sides: &[Side], wants: impl Fn(&str) -> bool) -> Result<Self> {
        let options = options(sides.first().context("nobody to measure")?)?;
        let backstage = Backstage::start(options.registry.clone())?;
        let mut images = BTreeMap::new();
        let stage = Stage::with(options, backstage.clone())?;
        for (name, parts, layers) in IMAGES {
            if !parts.iter().any(|part| wants(part)) {
                continue;
            }
            eprintln!("image {name}");
            let image = Image::new(layers()?, Dialect::Oci, &["/bin/sh"]);
            let published = stage.publish(&image, &format!("bench/{name}"), "1");
            stage.fetch(&published.reference)?;
            stage.soci(BUILD, &["create", &published.reference])?;
            let login = format!("{USER}:{PASSWORD}");
            stage.soci(
                BUILD,
                &["push", "--existing-index", "allow", "--user", &login, &published.reference],
            )?;
            stage.forget(&published.reference)?;
            images.insert(*name, Ready { image, published });
        }
        Ok(Self { backstage, images })
    }

    pub(crate) fn image(&self, name: &str) -> Result<&Ready> {
        self.images.get(name).with_context(|| format!("image {name} was not made"))
    }

    /// Starts daemon and containerd of a side on fresh roots, with the defaults.
    pub(crate) fn stage(&self, side: &Side, config: &str) -> Result<Stage> {
        let mut options = options(side)?;
        config.clone_into(&mut options.config);
        self.backstage.registry.clear_log();
        Stage::with(options, self.backstage.clone())
    }
}

fn options(side: &Side) -> Result<StageOptions> {
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.binaries = side.binaries.clone();
    options.config = String::new();
    options.log_level = "info".to_owned();
    Ok(options)
}
