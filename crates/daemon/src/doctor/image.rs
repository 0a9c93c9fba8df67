//! One image, as a pull would see it: the hosts that are asked and the login of each, the index, and each layer.
//!
//! Only the registry is asked, never what is on this machine already: a node that pulls the image for the first time is what
//! matters. A login that only the running daemon knows, from the kubelet's pulls, is not seen here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use soci_auth::AuthBoard;
use soci_auth::explain::{HostReport, Standing};
use soci_index::{DiscoverError, DiscoverRequest, Discovered, SociIndex, discover};
use soci_oci::media_type::{LayerCompression, layer_compression};
use soci_oci::{
    Descriptor, Digest, FetchClass, FetchContext, FetchError, FetchErrorKind, ImageRef, Index, Platform,
    media_type, with_causes,
};
use soci_registry::Repository;
use soci_snapshotter::plan::Reason;
use soci_ztoc::{DecodeLimits, Ztoc};

use super::{Finding, Level};
use crate::Config;
use crate::metrics::Metrics;
use crate::{keychains, registries};

/// How long looking at an image may take in all.
const PATIENCE: Duration = Duration::from_secs(60);
/// zTOCs that are fetched at a time.
const PARALLEL: usize = 4;
/// What to do about an index, or a part of it, that cannot be used.
const REINDEX: &str = "index the image anew: soci create --force, or soci convert --force";
/// The largest zTOC that is fetched, in bytes.
const MAX_ZTOC: u64 = soci_index::resolve::MAX_ZTOC_SIZE;

/// Looks at the image that `reference` names.
pub(super) async fn look(reference: &str, config: &Config) -> Vec<Finding> {
    let image: ImageRef = match reference.parse() {
        Ok(image) => image,
        Err(error) => {
            let what = format!("{reference:?}: {}", with_causes(&error));
            let change = "soci-snapshotter-grpc doctor registry.example/name:tag";
            return vec![Finding::new("image", Level::Error, what).change(change)];
        }
    };
    let (board, metrics) = (Arc::new(AuthBoard::new()), Metrics::default());
    let keychains = keychains::open(config, &board, &metrics, &|name| std::env::var_os(name));
    let registry = match registries::client(config, keychains.chain, board, &metrics) {
        Ok(registry) => registry,
        Err(error) => {
            let finding = Finding::new("image", Level::Error, format!("{error:#}"));
            return vec![finding.change("mend the file that is named, or [resolver] of our configuration")];
        }
    };
    let look = Look {
        repository: registry.repository(&image),
        image,
        config,
        context: FetchContext::new(Instant::now() + PATIENCE, FetchClass::OnDemand),
    };
    let mut findings = look.hosts().await;
    match look.manifest().await {
        Ok(manifest) => {
            findings.push(Finding::new("image", Level::Ok, format!("{}: manifest {manifest}", look.image)));
            look.layers(manifest, &mut findings).await;
        }
        Err((what, change)) => findings.push(Finding::new("image", Level::Error, what).change(change)),
    }
    findings
}

struct Look<'a> {
    repository: Repository,
    image: ImageRef,
    config: &'a Config,
    context: FetchContext,
}

impl Look<'_> {
    /// Which hosts are asked, in this order, and with which login.
    async fn hosts(&self) -> Vec<Finding> {
        match self.repository.explain().await {
            Ok(hosts) => hosts.iter().map(|host| self.host(host)).collect(),
            Err(error) => {
                let finding = Finding::new("hosts", Level::Error, with_causes(&error));
                vec![finding.change("mend the hosts.toml that is named, beneath [resolver] config_path")]
            }
        }
    }

    fn host(&self, report: &HostReport) -> Finding {
        let host = format!("{}{}", report.host, if report.mirror { " (mirror)" } else { "" });
        let used = report.options.iter().find(|option| option.standing == Standing::Used);
        if let Some(option) = used {
            let first = option.candidates.first();
            let entry = first.map(|candidate| format!(", entry {}", candidate.entry)).unwrap_or_default();
            let user = first.and_then(|candidate| candidate.username.as_ref());
            let user = user.map(|user| format!(", user {user:?}")).unwrap_or_default();
            return Finding::new("login", Level::Ok, format!("{host}: {}{entry}{user}", option.name));
        }
        let asked: Vec<String> =
            report.options.iter().map(|option| format!("{}: {}", option.name, option.why)).collect();
        let failed = report.options.iter().any(|option| option.standing == Standing::Failed);
        let what = format!("{host}: no login, asked without one ({})", asked.join("; "));
        let mut finding = Finding::new("login", if failed { Level::Warning } else { Level::Note }, what);
        if self.config.cri.is_some() {
            // Those that the kubelet's pulls brought are known to the running daemon alone.
            finding = finding.change(format!("soci auth explain --daemon {}", self.image));
        } else if failed {
            finding = finding.change("mend the file or helper that is named");
        }
        finding
    }

    /// Returns what to do about a fetch that failed.
    fn remedy(&self, error: &FetchError) -> String {
        let image = &self.image;
        match error.kind() {
            FetchErrorKind::Denied => {
                format!(
                    "soci auth explain --check {image} says which login is refused; log in anew, or mend the pull secret"
                )
            }
            FetchErrorKind::NotFound => format!("push it, or correct the name {image}"),
            FetchErrorKind::Unavailable => format!(
                "curl -v https://{}/v2/ from this node: name, route, proxy and certificate; or a mirror in hosts.toml",
                image.registry().identity()
            ),
            FetchErrorKind::Protocol => {
                "have the proxy or mirror between this node and the registry pass requests on unchanged"
                    .to_owned()
            }
            FetchErrorKind::Integrity => "push the image anew: what the registry has is damaged".to_owned(),
            FetchErrorKind::Local => "make room on this machine's disk, or mend it".to_owned(),
        }
    }

    /// Returns the digest of the manifest for this machine, or what is wrong and what to do.
    async fn manifest(&self) -> Result<Digest, (String, String)> {
        let error =
            |error: FetchError| (format!("{}: {}", self.image, with_causes(&error)), self.remedy(&error));
        let object = self.image.object();
        let (found, bytes) = self.repository.manifest_by_tag(&object, &self.context).await.map_err(error)?;
        if !media_type::is_index(&found.media_type) {
            return Ok(found.digest);
        }
        let index = Index::decode(&bytes).map_err(|error| {
            (format!("{}: {}", self.image, with_causes(&error)), "push the image anew".to_owned())
        })?;
        let host = Platform::host();
        let own =
            |entry: &&Descriptor| entry.platform.as_ref().is_some_and(|platform| platform.matches(&host));
        match index.manifests.iter().find(own) {
            Some(entry) => Ok(entry.digest),
            None => {
                let change = format!("build and push the image for {host} as well");
                Err((format!("{}: no manifest for {host}", self.image), change))
            }
        }
    }

    async fn layers(&self, manifest: Digest, findings: &mut Vec<Finding>) {
        let found = match self.index(manifest, self.config.discovery.v1).await {
            Ok(found) => found,
            Err(error) => {
                findings.push(self.no_index(manifest, &error).await);
                return;
            }
        };
        let index = &found.index;
        let what =
            format!("{} {}, by {:?}", index.version.as_str(), index.digest, found.source).to_lowercase();
        findings.push(Finding::new("index", Level::Ok, what));
        if let Some(first) =
            found.image_manifest.layers.iter().find(|layer| index.ztoc(&layer.digest).is_some())
        {
            findings.push(self.ranges(first).await);
        }
        let layers = futures::stream::iter(&found.image_manifest.layers);
        let looked = layers.map(|layer| self.layer(index, layer)).buffered(PARALLEL);
        findings.extend(looked.collect::<Vec<_>>().await);
    }

    async fn index(&self, manifest: Digest, v1: bool) -> Result<Discovered, DiscoverError> {
        let v2 = self.config.discovery.v2;
        let request = DiscoverRequest { image: self.image.clone(), manifest, explicit: None, v1, v2 };
        discover(&request, &self.repository, None, &self.context).await
    }

    async fn no_index(&self, manifest: Digest, error: &DiscoverError) -> Finding {
        if !error.is_no_index() {
            let change = match error.fetch() {
                Some(fetch) => self.remedy(fetch),
                None => REINDEX.to_owned(),
            };
            return Finding::new("index", Level::Error, with_causes(error)).change(change);
        }
        // It may have one that the configuration does not look for.
        if !self.config.discovery.v1
            && let Ok(found) = self.index(manifest, true).await
        {
            let what = format!("it has an index v1, {}, which is not looked for", found.index.digest);
            return Finding::new("index", Level::Warning, what).change("[pull_modes.soci_v1]\nenable = true");
        }
        Finding::new("index", Level::Warning, with_causes(error)).change(Reason::NoIndex.advice())
    }

    /// Whether a part of a layer can be had.
    async fn ranges(&self, layer: &Descriptor) -> Finding {
        let part = async {
            let stream = self.repository.blob_of(layer).open(0..2.min(layer.size), &self.context).await?;
            stream.try_for_each(|_| async { Ok(()) }).await
        };
        match part.await {
            Ok(()) => Finding::new("ranges", Level::Ok, "parts of layers are served"),
            Err(error) => Finding::new(
                "ranges",
                Level::Error,
                format!("layer {}: {}", layer.digest, with_causes(&error)),
            )
            .change(self.remedy(&error)),
        }
    }

    /// Whether a layer would be lazy.
    async fn layer(&self, index: &SociIndex, layer: &Descriptor) -> Finding {
        let name = format!("{} ({} bytes)", layer.digest, layer.size);
        let unpacked = |level, why: String| Finding::new("layer", level, format!("{name}: unpacked: {why}"));
        if layer.size < self.config.min_layer_size {
            let why = format!("smaller than min_layer_size, {}", self.config.min_layer_size);
            return unpacked(Level::Ok, why);
        }
        let Some(ztoc) = index.ztoc(&layer.digest) else {
            return match layer_compression(&layer.media_type) {
                Some(LayerCompression::Unsupported(form)) => {
                    unpacked(Level::Note, format!("{form} layers have no zTOC"))
                }
                _ => unpacked(Level::Ok, "the index leaves it out".to_owned()),
            };
        };
        let bytes = match self.repository.blob_bytes(ztoc, MAX_ZTOC, &self.context).await {
            Ok(bytes) => bytes,
            Err(error) => {
                let finding = unpacked(Level::Warning, format!("its zTOC: {}", with_causes(&error)));
                return finding.change(self.remedy(&error));
            }
        };
        match Ztoc::decode(bytes, &DecodeLimits::default()) {
            Ok(_) => Finding::new("layer", Level::Ok, format!("{name}: lazy, by zTOC {}", ztoc.digest)),
            Err(error) => unpacked(Level::Warning, format!("zTOC {}: {}", ztoc.digest, with_causes(&error)))
                .change(REINDEX),
        }
    }
}
