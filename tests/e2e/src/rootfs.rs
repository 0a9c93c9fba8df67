//! Layers with real bytes: a Debian root file system, Python packages on top of it, and large or many files.
//!
//! They take minutes to make and are kept in the cache. Files made by a generator are the same everywhere; those of
//! Debian are what the archive has on the day.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use flate2::Compression;
use flate2::write::GzEncoder;
use soci_testkit::layer_gen::{Attr, Layer, LayerBuilder, Numbers, digest};
use soci_testkit::mounts;
use soci_testkit::process::output;

use crate::{archive, cache};

/// A Debian root file system as debootstrap's `minbase` makes it: about 200 MB in 7,000 files.
///
/// # Errors
/// Where debootstrap fails.
pub fn debian() -> Result<Layer> {
    kept("debian", |into| {
        let work = tempfile::tempdir()?;
        let root = work.path().join("root");
        bootstrap(&root)?;
        pack(&root, into)
    })
}

/// Python with pandas, sklearn and matplotlib, as a layer on top of [`debian`]: about 1.2 GB in 37,000 files.
///
/// # Errors
/// Where a package cannot be installed.
pub fn python() -> Result<Layer> {
    let base = debian()?;
    kept("python", |into| {
        let work = tempfile::tempdir()?;
        let at = |name: &str| work.path().join(name);
        for name in ["base", "upper", "work", "merged"] {
            std::fs::create_dir(at(name))?;
        }
        let mut unpack = Command::new("tar");
        unpack.args(["-xzpf", "-", "--numeric-owner", "-C"]).arg(at("base")).stdin(Stdio::piped());
        let mut child = unpack.spawn().context("start tar")?;
        child.stdin.take().context("tar has no input")?.write_all(&base.blob)?;
        if !child.wait()?.success() {
            bail!("tar does not unpack the Debian layer");
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            at("base").display(),
            at("upper").display(),
            at("work").display()
        );
        let _unmount = Unmount(work.path());
        let merged = at("merged");
        output(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(&merged))?;
        for (kind, name) in [("proc", "proc"), ("sysfs", "sys")] {
            output(Command::new("mount").args(["-t", kind, kind]).arg(merged.join(name)))?;
        }
        let packages = "python3 python3-pandas python3-sklearn python3-matplotlib";
        let script = format!(
            "apt-get -q update && apt-get -qy --no-install-recommends install {packages} && apt-get clean && \
             rm -rf /var/lib/apt/lists/*"
        );
        // The network of the machine, as the archive was reached by it before.
        std::fs::copy("/etc/resolv.conf", merged.join("etc/resolv.conf")).context("copy resolv.conf")?;
        let mut install = Command::new("chroot");
        install
            .arg(&merged)
            .args(["sh", "-c", &script])
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C");
        output(&mut install)?;
        mounts::detach(&merged);
        // Deleted names would be character devices here; an added layer of packages has none that matter.
        pack(&at("upper"), into)
    })
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        mounts::detach(self.0);
    }
}

/// One file of `size` bytes, `/data/large`, that compresses to about a third.
///
/// # Errors
/// Where the cache cannot be written.
pub fn one_file(size: usize) -> Result<Layer> {
    kept(&format!("one-file-{size}"), |into| {
        let content = Numbers::new(5).prose(size);
        let tar = LayerBuilder::new()
            .dir("data", &Attr::mode(0o755))
            .file("data/large", &Attr::default(), &content)
            .tar();
        save(&tar, into)
    })
}

/// One file of `size` bytes, `/data/random`, that does not compress.
///
/// # Errors
/// Where the cache cannot be written.
pub fn random_file(size: usize) -> Result<Layer> {
    kept(&format!("random-file-{size}"), |into| {
        let content = Numbers::new(6).bytes(size);
        let tar = LayerBuilder::new()
            .dir("data", &Attr::mode(0o755))
            .file("data/random", &Attr::default(), &content)
            .tar();
        save(&tar, into)
    })
}

/// `count` files of about 600 bytes in directories of a hundred, beneath `/many`.
///
/// # Errors
/// Where the cache cannot be written.
pub fn many_files(count: usize) -> Result<Layer> {
    kept(&format!("many-files-{count}"), |into| {
        let mut numbers = Numbers::new(9);
        let mut layer = LayerBuilder::new().dir("many", &Attr::mode(0o755));
        let text = numbers.prose(1 << 20);
        for number in 0..count {
            let directory = number / 100;
            if number % 100 == 0 {
                layer = layer.dir(format!("many/{directory:04}"), &Attr::mode(0o755));
            }
            let length = 500 + (numbers.next_u64() % 200) as usize;
            let start = (numbers.next_u64() % 1_000_000) as usize;
            let name = format!("many/{directory:04}/file-{number:06}");
            layer = layer.file(name, &Attr::default(), &text[start..start + length]);
        }
        save(&layer.tar(), into)
    })
}

/// `count` layers of about 1 MB as stored, each with a hundred small files and one that does not compress, beneath a
/// directory of its own. No two seeds have a layer in common.
pub fn many_layers(seed: u64, count: usize) -> Vec<Layer> {
    let layer = |number: usize| {
        let mut numbers = Numbers::new(seed * 1000 + number as u64);
        let top = format!("layer-{seed}-{number:03}");
        let mut layer = LayerBuilder::new().dir(&top, &Attr::mode(0o755));
        for file in 0..100 {
            layer = layer.file(format!("{top}/small-{file:02}"), &Attr::default(), &numbers.prose(300));
        }
        layer.file(format!("{top}/data"), &Attr::default(), &numbers.bytes(980_000)).gzip()
    };
    (0..count).map(layer).collect()
}

fn bootstrap(root: &Path) -> Result<()> {
    let (uri, keyring) = archive::find()?;
    let release = std::fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let suite = suite.context("/etc/os-release names no suite")?.trim_matches('"');
    let mut command = Command::new("debootstrap");
    command.args(["--variant=minbase"]);
    if !keyring.is_empty() {
        command.arg(format!("--keyring={keyring}"));
    }
    output(command.arg(suite).arg(root).arg(uri))?;
    // What only apt needs, and what differs from day to day.
    for name in ["var/cache/apt/archives", "var/lib/apt/lists", "var/log"] {
        for entry in std::fs::read_dir(root.join(name))?.flatten() {
            let path = entry.path();
            let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        }
    }
    Ok(())
}

/// Packs a directory with the system's tar, which keeps everything.
fn pack(root: &Path, into: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["-c", "--format=pax", "--sort=name", "--numeric-owner", "--xattrs", "--one-file-system"])
        .args(["--pax-option=delete=atime,delete=ctime", "-C"])
        .arg(root)
        .arg(".")
        .stdout(Stdio::piped());
    let mut child = tar.spawn().context("start tar")?;
    let packed = child.stdout.take().context("tar has no output")?;
    store(BufReader::with_capacity(1 << 20, packed), into)?;
    if !child.wait()?.success() {
        bail!("tar does not pack {}", root.display());
    }
    Ok(())
}

fn save(tar: &[u8], into: &Path) -> Result<()> {
    store(tar, into)
}

/// Compresses a tar stream into a directory of the cache: the layer and its diff id.
fn store(tar: impl Read, into: &Path) -> Result<()> {
    std::fs::create_dir_all(into)?;
    let file = File::create(into.join("layer.tar.gz"))?;
    let mut encoder = GzEncoder::new(io::BufWriter::with_capacity(1 << 20, file), Compression::default());
    let mut hashed = soci_testkit::layer_gen::Hashed::new(tar);
    io::copy(&mut hashed, &mut encoder)?;
    encoder.finish()?.flush()?;
    std::fs::write(into.join("diff-id"), hashed.digest())?;
    Ok(())
}

/// Returns a layer of the cache.
fn kept(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<Layer> {
    let directory = cache::keep(name, make)?;
    let blob = std::fs::read(directory.join("layer.tar.gz"))?;
    Ok(Layer {
        digest: digest(&blob),
        diff_id: std::fs::read_to_string(directory.join("diff-id"))?,
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
        blob: blob.into(),
    })
}
