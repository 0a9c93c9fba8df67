//! Told to end, the program lets the calls that are under way have their answers.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use soci_testkit::{Action, Fault, Listener, Matcher, wait};
use support::image::publish;
use support::stage::{Stage, layers, pull_layer, registry};
use tonic::Code;

/// A registry is asked again for as long as it fails.
const PATIENT: &str = "[background_fetch]\ndisable = true\n[content_store]\ncontainerd_address = '/nonexistent/c.sock'\n\
                       [http]\nMaxRetries = 100000\nMinWaitMsec = 5\nMaxWaitMsec = 20\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_lets_a_prepare_end_and_leaves_its_mount() {
    let registry = registry().await;
    let published = publish(&registry, "team/app", layers().0, |_| true);
    let mut stage = Stage::new(&registry, PATIENT).await;
    registry.fault(Fault::new(Matcher::on(Listener::Registry), Action::status(503)));
    let mut client = stage.client.clone();
    let pulling = tokio::spawn(async move { pull_layer(&mut client, &published, 0).await.0 });
    let asked = || (!registry.log().is_empty()).then_some(());
    assert!(wait::until(Duration::from_secs(30), asked).is_some(), "nothing is asked for");
    kill_process(Pid::from_child(&stage.child), Signal::TERM).unwrap();
    stage.wait_for("Got terminated").await;
    registry.clear_faults();
    let answer = pulling.await.unwrap();
    assert_eq!(answer.unwrap_err().code(), Code::AlreadyExists, "{:#?}", stage.log.lock().unwrap());
    assert!(stage.child.wait().unwrap().success());
    assert_eq!(stage.fuse_mounts(), 1, "mounts stay for the next one");
    stage.start_again().await;
    stage.wait_for("mounted again").await;
}
