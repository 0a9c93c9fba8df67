//! A Debian package of both binaries, units, default configuration, manual pages and completions.
//!
//! A tree is staged as it will be installed and given to `dpkg-deb`. What the binaries know about themselves (defaults, manual
//! pages, completions) they write; the rest is in `packaging/`. Built from the same sources twice it is the same file.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, heading, metadata, root, succeed, target};

const DAEMON: &str = "soci-snapshotter-grpc";
const PROGRAMS: [&str; 2] = ["soci", DAEMON];
/// Shells with the directory and name of a program's completions.
const SHELLS: [(&str, &str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/", ""),
    ("zsh", "usr/share/zsh/vendor-completions/_", ""),
    ("fish", "usr/share/fish/vendor_completions.d/", ".fish"),
];
const CONFIG: &str = "etc/soci-snapshotter-grpc/config.toml";
const USAGE: &str = "usage: cargo xtask package [--profile NAME | --binaries DIR] [--output DIR]";

struct Wanted {
    profile: String,
    binaries: Option<PathBuf>,
    output: Option<PathBuf>,
}

/// Runs the verb. The last line that it prints is the path of the package.
pub(crate) fn package(arguments: &[String]) -> Result<()> {
    let wanted = read(arguments)?;
    let target = target()?;
    let binaries = match &wanted.binaries {
        Some(directory) => directory.clone(),
        None => build(&wanted.profile, &target)?,
    };
    let output = wanted.output.unwrap_or_else(|| target.join("package"));
    fs::create_dir_all(&output).with_context(|| format!("make {}", output.display()))?;
    heading("stage the tree");
    let tree = Tree::new(output.join("tree"))?;
    tree.fill(&binaries)?;
    let version = version()?;
    let architecture = words(Command::new("dpkg").arg("--print-architecture"))?;
    tree.control(&version, &architecture)?;
    heading("dpkg-deb");
    let package = output.join(format!("soci-snapshotter_{version}_{architecture}.deb"));
    let mut pack = Command::new("dpkg-deb");
    // Binaries with debugging information take minutes to compress.
    let compression =
        if wanted.binaries.is_none() && wanted.profile == "release" { "-Zxz" } else { "-Znone" };
    pack.args(["--root-owner-group", compression, "--build"]).arg(&tree.0).arg(&package);
    if let Some(seconds) = last_commit() {
        pack.env("SOURCE_DATE_EPOCH", seconds);
    }
    succeed(pack.stdout(Stdio::null())).context("dpkg-deb is part of Debian's package dpkg")?;
    fs::remove_dir_all(&tree.0).with_context(|| format!("remove {}", tree.0.display()))?;
    println!("{}", package.display());
    Ok(())
}

fn read(arguments: &[String]) -> Result<Wanted> {
    let mut wanted = Wanted { profile: "release".to_owned(), binaries: None, output: None };
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word}: value missing\n{USAGE}"))?;
        match word.as_str() {
            "--profile" => value.clone_into(&mut wanted.profile),
            "--binaries" => wanted.binaries = Some(value.into()),
            "--output" => wanted.output = Some(value.into()),
            _ => bail!("{word}: unknown\n{USAGE}"),
        }
    }
    Ok(wanted)
}

fn build(profile: &str, target: &Path) -> Result<PathBuf> {
    heading("build");
    let mut command = cargo(&["build", "--profile", profile]);
    command.args(PROGRAMS.iter().flat_map(|program| ["--package", program]));
    // What `--version` and the metrics say beside the version.
    if let Ok(revision) = words(git().args(["rev-parse", "--short=12", "HEAD"])) {
        command.env("SOCI_REVISION", revision);
    }
    succeed(&mut command)?;
    Ok(target.join(if profile == "dev" { "debug" } else { profile }))
}

fn version() -> Result<String> {
    let metadata = metadata()?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let daemon = packages.iter().find(|package| package["name"] == DAEMON).context("no daemon here")?;
    Ok(daemon["version"].as_str().context("the daemon has no version")?.to_owned())
}

/// Returns when the sources were last changed, in seconds, where that is known.
fn last_commit() -> Option<String> {
    words(git().args(["log", "-1", "--format=%ct"])).ok()
}

fn git() -> Command {
    let mut command = Command::new("git");
    command.current_dir(root());
    command
}

/// Runs a command and returns what it prints, without the line's end.
fn words(command: &mut Command) -> Result<String> {
    let bytes = output(command)?;
    Ok(String::from_utf8(bytes)?.trim().to_owned())
}

fn output(command: &mut Command) -> Result<Vec<u8>> {
    let line = crate::run::line(command);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start {line}"))?;
    if !output.status.success() {
        bail!("{line}: {}", output.status);
    }
    Ok(output.stdout)
}

/// A tree as it will be installed.
struct Tree(PathBuf);

impl Tree {
    /// Makes an empty one, in place of what an earlier run left.
    fn new(at: PathBuf) -> Result<Self> {
        if at.exists() {
            fs::remove_dir_all(&at).with_context(|| format!("remove {}", at.display()))?;
        }
        Ok(Self(at))
    }

    fn fill(&self, binaries: &Path) -> Result<()> {
        let packaging = root().join("packaging");
        for program in PROGRAMS {
            let from = binaries.join(program);
            self.copy(&from, &format!("usr/bin/{program}"), 0o755)?;
            for (shell, directory, end) in SHELLS {
                let text = output(Command::new(&from).args(["internal-docs", "completions", shell]))?;
                self.write(&format!("{directory}{program}{end}"), &text)?;
            }
            let pages = self.directory("usr/share/man/man1")?;
            output(Command::new(&from).args(["internal-docs", "man"]).arg(pages))?;
        }
        let pages = self.0.join("usr/share/man/man1");
        for page in fs::read_dir(&pages)? {
            let page = page?.path();
            fs::set_permissions(&page, Permissions::from_mode(0o644))?;
            succeed(Command::new("gzip").args(["-9n"]).arg(&page))?;
        }
        let defaults = output(Command::new(binaries.join(DAEMON)).args(["config", "default"]))?;
        let head =
            b"# Every key with its default; what each does: /usr/share/doc/soci-snapshotter/config.md\n\n";
        self.write(CONFIG, &[head.as_slice(), &defaults].concat())?;
        for unit in ["soci-snapshotter-grpc.service", "soci-snapshotter-grpc.socket"] {
            self.copy(&packaging.join("systemd").join(unit), &format!("lib/systemd/system/{unit}"), 0o644)?;
        }
        let documents = "usr/share/doc/soci-snapshotter";
        for (from, to) in [
            ("README.md", "README.md"),
            ("CHANGELOG.md", "changelog"),
            ("docs/auth.md", "auth.md"),
            ("docs/cli.md", "cli.md"),
            ("docs/config.md", "config.md"),
            ("docs/metrics.md", "metrics.md"),
            ("packaging/debian/copyright", "copyright"),
            ("packaging/containerd/config-v2.toml", "examples/containerd-1.6-1.7.toml"),
            ("packaging/containerd/config-v3.toml", "examples/containerd-2.toml"),
        ] {
            self.copy(&root().join(from), &format!("{documents}/{to}"), 0o644)?;
        }
        succeed(Command::new("gzip").args(["-9n"]).arg(self.0.join(documents).join("changelog")))
    }

    /// Writes the package's description and its scripts.
    fn control(&self, version: &str, architecture: &str) -> Result<()> {
        let debian = root().join("packaging/debian");
        let size = words(
            Command::new("du").args(["--summarize", "--apparent-size", "--block-size=1K"]).arg(&self.0),
        )?;
        let size = size.split_whitespace().next().unwrap_or("0");
        let glibc = self.glibc()?;
        let template = fs::read_to_string(debian.join("control.in")).context("read control.in")?;
        let text = template
            .replace("@VERSION@", version)
            .replace("@ARCHITECTURE@", architecture)
            .replace("@SIZE@", size)
            .replace("@DEPENDS@", &format!("libc6 (>= {glibc}), libgcc-s1"));
        self.write("DEBIAN/control", text.as_bytes())?;
        self.write("DEBIAN/conffiles", format!("/{CONFIG}\n").as_bytes())?;
        for script in ["postinst", "prerm", "postrm"] {
            self.copy(&debian.join(script), &format!("DEBIAN/{script}"), 0o755)?;
        }
        Ok(())
    }

    /// Returns the newest version of the C library whose symbols a binary names.
    fn glibc(&self) -> Result<String> {
        let mut newest = (2, 17);
        for program in PROGRAMS {
            let mut grep = Command::new("grep");
            grep.args(["-a", "-o", "-E", "GLIBC_[0-9.]+"]).arg(self.0.join("usr/bin").join(program));
            let names = words(grep.env("LC_ALL", "C"))?;
            newest = newest.max(newest_glibc(&names).unwrap_or(newest));
        }
        Ok(format!("{}.{}", newest.0, newest.1))
    }

    fn directory(&self, path: &str) -> Result<PathBuf> {
        let at = self.0.join(path);
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o755).create(&at).with_context(|| format!("make {}", at.display()))?;
        Ok(at)
    }

    fn place(&self, path: &str) -> Result<PathBuf> {
        let parent = Path::new(path).parent().and_then(Path::to_str).unwrap_or_default();
        self.directory(parent)?;
        Ok(self.0.join(path))
    }

    fn write(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let at = self.place(path)?;
        fs::write(&at, bytes).with_context(|| format!("write {}", at.display()))?;
        Ok(fs::set_permissions(&at, Permissions::from_mode(0o644))?)
    }

    fn copy(&self, from: &Path, path: &str, mode: u32) -> Result<()> {
        let at = self.place(path)?;
        fs::copy(from, &at).with_context(|| format!("copy {}", from.display()))?;
        Ok(fs::set_permissions(&at, Permissions::from_mode(mode))?)
    }
}

/// Returns the newest of some lines `GLIBC_2.N`.
fn newest_glibc(names: &str) -> Option<(u32, u32)> {
    let version = |line: &str| {
        let mut numbers = line.strip_prefix("GLIBC_")?.split('.').map(|number| number.parse::<u32>().ok());
        Some((numbers.next()??, numbers.next()??))
    };
    names.lines().filter_map(version).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_library_version_counts_as_a_number() {
        assert_eq!(newest_glibc("GLIBC_2.9\nGLIBC_2.34\nGLIBC_2.4.1\nGLIBC_.\n"), Some((2, 34)));
        assert_eq!(newest_glibc(""), None);
    }

    #[test]
    fn unknown_words_are_refused() {
        let wanted = |words: &[&str]| read(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        assert_eq!(wanted(&["--profile", "dev"]).unwrap().profile, "dev");
        assert!(wanted(&["--profile"]).is_err());
        assert!(wanted(&["--nope", "x"]).is_err());
    }
}
