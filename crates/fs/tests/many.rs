//! Many mounts in one process. Alone in its process, because it counts threads. Needs root and `/dev/fuse`.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::fs;

use common::Machine;
use soci_testkit::layer_gen::{Attr, LayerBuilder};
use soci_testkit::mounts;

fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn a_hundred_mounts_are_served_by_the_same_few_threads() {
    let machine = Machine::new();
    let one = machine.mount_tar(&LayerBuilder::new().file("f", &Attr::default(), b"0").tar());
    assert_eq!(fs::read(one.at.join("f")).unwrap(), b"0");
    let before = threads();
    let mounted: Vec<_> = (1..=100)
        .map(|number| {
            let content = number.to_string();
            machine.mount_tar(&LayerBuilder::new().file("f", &Attr::default(), content.as_bytes()).tar())
        })
        .collect();
    assert_eq!(machine.hub.mounts(), 101);
    std::thread::scope(|scope| {
        for half in mounted.chunks(50).enumerate().map(|(half, mounts)| (half * 50 + 1, mounts)) {
            scope.spawn(move || {
                for (number, mounted) in (half.0..).zip(half.1) {
                    assert_eq!(fs::read_to_string(mounted.at.join("f")).unwrap(), number.to_string());
                }
            });
        }
    });
    // A reader that was joined may take a moment to leave.
    common::until("only the threads of before are left", || threads() == before);
    let tops: Vec<_> = mounted.iter().map(|mounted| mounted.top().to_owned()).collect();
    drop(mounted);
    assert_eq!(machine.hub.mounts(), 1);
    for top in tops {
        assert_eq!(mounts::beneath(&top).unwrap(), []);
    }
    assert_eq!(fs::read(one.at.join("f")).unwrap(), b"0");
}
