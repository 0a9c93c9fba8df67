//! `soci auth explain`: which credential an image would be fetched with, and why.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use soci_auth::explain::{
    CandidateReport, ExplainRequest, HostReport, Judged, OptionReport, Report, Standing,
};
use soci_oci::ImageRef;
use soci_registry::{NoMeters, Registry};

use crate::app::App;
use crate::cli::{Auth, AuthExplain};
use crate::{control, credentials, duration};

pub(crate) async fn run(app: &App, command: Auth) -> anyhow::Result<()> {
    let Auth::Explain(args) = command;
    let name = args.image.as_deref().filter(|name| !name.is_empty());
    let name = name.context("please provide an image reference to explain")?;
    // Written out, so that both sides understand the same by a short name.
    let image: ImageRef = name.parse().with_context(|| format!("image {name:?}"))?;
    let report = match args.daemon {
        true => {
            let question = ExplainRequest { image: image.to_string(), check: args.check };
            control::ask(&args.control, "/v1/auth/explain", &question).await?
        }
        false => own(app, &args, &image).await?,
    };
    match args.json {
        true => app.output.json(&report)?,
        false => app.output.text(&text(&report)),
    }
    match report.check {
        Some(check) if !check.served => bail!("the image is not served"),
        _ => Ok(()),
    }
}

/// What this command would use itself: `--user`, else the Docker config of who runs it. Both are shown, although only one of
/// them is asked by a command.
async fn own(app: &App, args: &AuthExplain, image: &ImageRef) -> anyhow::Result<Report> {
    let open = |auth| Registry::new(args.registry.settings(), auth, Arc::new(NoMeters));
    let repository =
        open(credentials::authenticator(&args.registry, image.registry()).await?)?.repository(image);
    let check = match args.check {
        true => Some(repository.probe(&app.context()).await),
        false => None,
    };
    let mut hosts = repository.explain().await?;
    if args.registry.user.is_some() {
        let others = open(credentials::docker_config())?.repository(image).explain().await?;
        for (host, other) in hosts.iter_mut().zip(others) {
            let why = "--user is given, so that it is not asked, even when --user is refused";
            other.options.into_iter().for_each(|option| host.push_unasked(option, why));
        }
    } else {
        hosts.iter_mut().for_each(|host| host.insert_off(0, "--user", "it is not given"));
    }
    Ok(Report { image: image.to_string(), hosts, check })
}

/// Returns a report for people.
fn text(report: &Report) -> String {
    let mut text = format!("{}\n", report.image);
    for host in &report.hosts {
        write_host(&mut text, host);
    }
    if let Some(check) = &report.check {
        let word = if check.served { "served" } else { "not served" };
        let _ = writeln!(text, "\ncheck: {word}: {}", check.answer);
    }
    text
}

fn write_host(text: &mut String, host: &HostReport) {
    let mirror = if host.mirror { " (mirror)" } else { "" };
    let _ = writeln!(text, "\n{}{mirror}, repository {}", host.host, host.repository);
    if let Some(namespace) = &host.namespace {
        let _ = writeln!(text, "  pulled for a pod of namespace {namespace}");
    }
    for (at, option) in host.options.iter().enumerate() {
        let _ = writeln!(text, "  {}. {:<20} {}", at + 1, option.name, summary(option));
        for finding in option.findings.iter().filter(|finding| !option.why.contains(finding.as_str())) {
            let _ = writeln!(text, "       looked: {finding}");
        }
        for candidate in &option.candidates {
            let _ = writeln!(text, "       {}", describe(candidate));
        }
    }
    let _ = match &host.uses {
        Some(option) => writeln!(text, "  => {option}"),
        None => writeln!(text, "  => anonymous: no option has a credential"),
    };
}

fn summary(option: &OptionReport) -> String {
    let word = match option.standing {
        Standing::Used => "used",
        Standing::Outranked => "not used",
        Standing::Empty => "empty",
        Standing::Failed => "failed",
        Standing::Off => "off",
    };
    format!("{word}: {}", option.why)
}

fn describe(candidate: &CandidateReport) -> String {
    let CandidateReport { entry, fingerprint, kind, .. } = candidate;
    let mut parts = vec![format!("{entry}: {kind}")];
    parts.extend(candidate.username.as_ref().map(|user| format!("user {user}")));
    parts.push(format!("fingerprint {fingerprint}"));
    parts.extend(candidate.age_seconds.map(|age| format!("{} old", span(age))));
    parts.extend(candidate.flaw.as_ref().map(|flaw| format!("cannot be presented: {flaw}")));
    parts.extend(candidate.accepted.map(|judged| said("accepted", judged)));
    parts.extend(candidate.rejected.map(|judged| said("refused", judged)));
    parts.extend(candidate.rests_seconds.map(|left| format!("rests for {} more", span(left))));
    parts.join(", ")
}

fn said(word: &str, Judged { seconds_ago, status }: Judged) -> String {
    let status = status.map(|status| format!(" with status {status}")).unwrap_or_default();
    format!("{word}{status} {} ago", span(seconds_ago))
}

fn span(seconds: u64) -> String {
    duration::format(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use soci_auth::explain::Check;

    use super::*;

    #[test]
    fn a_report_reads_from_the_first_option_to_the_one_that_is_used() {
        let candidate = CandidateReport {
            entry: "pull of reg.example/a:1".into(),
            fingerprint: "0a1b2c".into(),
            kind: "user name and password".into(),
            username: Some("AWS".into()),
            age_seconds: Some(90),
            flaw: None,
            accepted: Some(Judged { seconds_ago: 5, status: Some(206) }),
            rejected: None,
            rests_seconds: None,
        };
        let option = |name: &str, standing, why: &str, findings: &[&str], candidates| OptionReport {
            name: name.into(),
            standing,
            why: why.into(),
            findings: findings.iter().map(|finding| (*finding).to_owned()).collect(),
            candidates,
        };
        let report = Report {
            image: "reg.example/a:1".into(),
            hosts: vec![HostReport {
                host: "https://reg.example".into(),
                registry: "reg.example".into(),
                repository: "a".into(),
                mirror: false,
                namespace: Some("team".into()),
                uses: Some("cri".into()),
                options: vec![
                    option("docker-config", Standing::Empty, "none", &["config.json is missing"], vec![]),
                    option("cri", Standing::Used, "it is first", &[], vec![candidate]),
                    option("kubernetes-secrets", Standing::Off, "it is off", &[], vec![]),
                ],
            }],
            check: Some(Check { served: false, answer: "status 403".into() }),
        };
        assert_eq!(
            text(&report),
            "reg.example/a:1\n\
             \n\
             https://reg.example, repository a\n  \
               pulled for a pod of namespace team\n  \
               1. docker-config        empty: none\n       \
                    looked: config.json is missing\n  \
               2. cri                  used: it is first\n       \
                    pull of reg.example/a:1: user name and password, user AWS, fingerprint 0a1b2c, 1m30s old, \
             accepted with status 206 5s ago\n  \
               3. kubernetes-secrets   off: it is off\n  \
               => cri\n\
             \n\
             check: not served: status 403\n"
        );
    }
}
