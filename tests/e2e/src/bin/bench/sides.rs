//! Who is measured, and the images and the registry that all of them share.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use soci_e2e::binaries::Binaries;
use soci_e2e::publish::{BUILD, Published};
use soci_e2e::stage::{Backstage, PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, rootfs};
use soci_testkit::AuthMode;
use soci_testkit::faults::{Action, Fault, Matcher};
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

/// An image to be made.
struct Recipe {
    name: &'static str,
    /// The parts that need it.
    parts: &'static [&'static str],
    layers: fn() -> Result<Vec<soci_testkit::layer_gen::Layer>>,
    /// Layers below this many bytes get no zTOC; `None` is the default.
    min_layer_size: Option<&'static str>,
}

const IMAGES: &[Recipe] = &[
    Recipe {
        name: "big",
        parts: &["index", "big", "read", "background"],
        layers: || Ok(vec![rootfs::debian()?, rootfs::one_file(LARGE)?]),
        min_layer_size: None,
    },
    Recipe {
        name: "files10k",
        parts: &["files10k"],
        layers: || Ok(vec![rootfs::debian()?, rootfs::many_files(10_000)?]),
        min_layer_size: None,
    },
    Recipe {
        name: "files100k",
        parts: &["files100k"],
        layers: || Ok(vec![rootfs::debian()?, rootfs::many_files(100_000)?]),
        min_layer_size: None,
    },
    Recipe {
        name: "py",
        parts: &["py", "far", "background"],
        layers: || Ok(vec![rootfs::debian()?, rootfs::python()?]),
        min_layer_size: None,
    },
    many("layers-a", &["layers127", "restart", "idle500"], || Ok(rootfs::many_layers(1, LAYERS))),
    many("layers-b", &["idle500"], || Ok(rootfs::many_layers(2, LAYERS))),
    many("layers-c", &["idle500"], || Ok(rootfs::many_layers(3, LAYERS))),
    many("layers-d", &["idle500"], || Ok(rootfs::many_layers(4, LAYERS))),
];

/// As many layers as an image can have: overlayfs takes no more.
pub(crate) const LAYERS: usize = 127;

const fn many(
    name: &'static str,
    parts: &'static [&'static str],
    layers: fn() -> Result<Vec<soci_testkit::layer_gen::Layer>>,
) -> Recipe {
    Recipe { name, parts, layers, min_layer_size: Some("0") }
}

impl Bench {
    /// Makes the images that the wanted parts need, and their indexes by our command line.
    pub(crate) fn prepare(sides: &[Side], wants: impl Fn(&str) -> bool) -> Result<Self> {
        let options = options(sides.first().context("nobody to measure")?)?;
        let backstage = Backstage::start(options.registry.clone())?;
        let mut images = BTreeMap::new();
        let stage = Stage::with(options, backstage.clone())?;
        for Recipe { name, parts, layers, min_layer_size } in IMAGES {
            if !parts.iter().any(|part| wants(part)) {
                continue;
            }
            eprintln!("image {name}");
            let image = Image::new(layers()?, Dialect::Oci, &["/bin/sh"]);
            let published = stage.publish(&image, &format!("bench/{name}"), "1");
            stage.fetch(&published.reference)?;
            let mut create = vec!["create"];
            if let Some(size) = min_layer_size {
                create.extend(["--min-layer-size", size]);
            }
            create.push(&published.reference);
            stage.soci(BUILD, &create)?;
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

    /// Puts a road between the registry and all who ask it, until the result is dropped.
    pub(crate) fn road(&self, delay: Duration, bytes_per_second: Option<u64>) -> Road<'_> {
        self.backstage.registry.shape(delay, bytes_per_second);
        Road(self)
    }

    /// Takes the registry away, until the result is dropped: whoever connects is hung up on.
    pub(crate) fn registry_down(&self) -> Road<'_> {
        self.backstage.registry.fault(Fault::new(Matcher::any(), Action::Hangup));
        Road(self)
    }

    /// Starts daemon and containerd of a side on fresh roots, with the defaults.
    pub(crate) fn stage(&self, side: &Side, config: &str) -> Result<Stage> {
        let mut options = options(side)?;
        config.clone_into(&mut options.config);
        self.backstage.registry.clear_log();
        Stage::with(options, self.backstage.clone())
    }
}

/// Trouble on the way to the registry; over when dropped.
#[derive(Debug)]
pub(crate) struct Road<'a>(&'a Bench);

impl Drop for Road<'_> {
    fn drop(&mut self) {
        self.0.backstage.registry.shape(Duration::ZERO, None);
        self.0.backstage.registry.clear_faults();
    }
}

/// The unit that our daemon is shipped with.
const UNIT: &str = include_str!("../../../../../packaging/systemd/soci-snapshotter-grpc.service");

/// Returns the variables that the unit sets.
fn unit_environment() -> impl Iterator<Item = (String, OsString)> {
    let set = UNIT.lines().filter_map(|line| line.strip_prefix("Environment=")?.split_once('='));
    set.map(|(name, value)| (name.to_owned(), value.into()))
}

fn options(side: &Side) -> Result<StageOptions> {
    let mut options = StageOptions::new(AuthMode::Basic)?;
    if side.name == "ours" {
        options.env.extend(unit_environment());
    }
    options.binaries = side.binaries.clone();
    options.config = String::new();
    options.log_level = "info".to_owned();
    Ok(options)
}
