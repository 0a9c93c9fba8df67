use proptest::prelude::*;

use super::*;
use crate::records::tests::mount_record;

fn open(root: &Path) -> Arc<Store> {
    let (store, findings) = Store::open(root).unwrap();
    assert!(findings.is_empty(), "{findings:?}");
    store
}

fn make(store: &Arc<Store>, name: &str, parent: Option<&str>, kind: Kind) -> Result<Arc<Record>, Error> {
    store.draft(parent)?.write(name, kind, Written::default()).map_err(|(_, error)| error)
}

fn labels(text: &str) -> BTreeMap<String, String> {
    [("l".to_owned(), text.to_owned())].into()
}

#[test]
fn snapshots_survive_reopening() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let base = make(&store, "base", None, Kind::Active).unwrap();
    store.commit("base", "layer", None, labels("x"), Usage { size: 4096, inodes: 1 }).unwrap();
    let lazy = Written { lazy: Some(mount_record()), ..Written::default() };
    store.draft(Some("layer")).unwrap().write("lazy", Kind::Committed, lazy).unwrap();
    make(&store, "container", Some("lazy"), Kind::Active).unwrap();
    let before = store.list();
    drop(store);
    let store = open(root.path());
    assert_eq!(store.list(), before);
    let chain: Vec<_> =
        store.chain("container").unwrap().iter().map(|part| part.record.name.clone()).collect();
    assert_eq!(chain, ["container", "lazy", "layer"]);
    assert_eq!(store.get("layer").unwrap().id, base.id, "committing keeps the directory");
    assert!(make(&store, "next", None, Kind::Active).unwrap().id > 3, "ids are not used twice");
}

#[test]
fn directories_have_the_layout_and_modes_of_the_reference() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let active = make(&store, "a", None, Kind::Active).unwrap();
    let view = make(&store, "v", None, Kind::View).unwrap();
    let mode = |path: PathBuf| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(root.path().join("snapshots")), 0o700);
    assert_eq!(mode(root.path().join("snapshots/1")), 0o700);
    assert_eq!(mode(store.dir(active.id).fs()), 0o755);
    assert_eq!(mode(store.dir(active.id).work()), 0o711);
    assert!(!store.dir(view.id).work().exists());
}

#[test]
fn an_unwritten_draft_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    make(&store, "p", None, Kind::Active).unwrap();
    store.commit("p", "parent", None, BTreeMap::new(), Usage::default()).unwrap();
    let draft = store.draft(Some("parent")).unwrap();
    let dir = draft.dir().path().to_owned();
    assert!(dir.exists());
    assert!(store.reclaimable().unwrap().is_empty(), "a draft is in use");
    assert_eq!(
        store.remove("parent").unwrap_err().code(),
        Code::FailedPrecondition,
        "a draft pins its parent"
    );
    drop(draft);
    assert!(!dir.exists());
    store.remove("parent").unwrap();
}

#[test]
fn a_draft_with_content_is_reclaimed_later() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let draft = store.draft(None).unwrap();
    fs::write(draft.dir().fs().join("file"), b"x").unwrap();
    let dir = draft.dir().path().to_owned();
    drop(draft);
    assert_eq!(store.reclaimable().unwrap(), [dir]);
}

#[test]
fn a_taken_name_gives_the_draft_back() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    make(&store, "a", None, Kind::Active).unwrap();
    let (draft, error) = store.draft(None).unwrap().write("a", Kind::Active, Written::default()).unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
    assert_eq!(draft.write("b", Kind::Active, Written::default()).unwrap().name, "b");
}

#[test]
fn a_record_cut_at_any_byte_costs_one_snapshot() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let kept = make(&store, "kept", None, Kind::Active).unwrap();
    let lost = make(&store, "lost", None, Kind::Active).unwrap();
    let file = store.dir(lost.id).path().join(records::RECORD);
    drop(store);
    let whole = fs::read(&file).unwrap();
    for cut in 0..whole.len() {
        fs::write(&file, &whole[..cut]).unwrap();
        let (store, findings) = Store::open(root.path()).unwrap();
        assert_eq!(store.list(), std::slice::from_ref(&kept), "cut at {cut}");
        // An empty one was never answered, which is no finding.
        assert_eq!(findings.len(), usize::from(cut > 0));
        assert!(findings.iter().all(|finding| !finding.kept));
        assert_eq!(store.reclaimable().unwrap(), [store.dir(lost.id).path()]);
    }
    // Overlay was mounted there, so a container may have written.
    fs::create_dir(file.with_file_name("work").join("work")).unwrap();
    for cut in [0, 1, whole.len() - 1] {
        fs::write(&file, &whole[..cut]).unwrap();
        let (store, findings) = Store::open(root.path()).unwrap();
        assert!(findings[0].kept, "cut at {cut}");
        assert!(store.reclaimable().unwrap().is_empty(), "a container's data");
        let next = make(&store, "next", None, Kind::Active).unwrap();
        assert_ne!(next.id, lost.id);
        store.remove("next").unwrap();
        fs::remove_dir_all(store.dir(next.id).path()).unwrap();
    }
    fs::write(&file, &whole).unwrap();
    assert_eq!(open(root.path()).list().len(), 2);
}

/// What is on disk after being killed between any two steps of an operation is the state before it or after it.
#[test]
fn killed_at_any_step_an_operation_happened_or_did_not() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let base = make(&store, "base", None, Kind::Active).unwrap();
    let dir = store.dir(base.id);
    let file = dir.path().join(records::RECORD);
    let next = dir.path().join("record.next");
    let before = fs::read(&file).unwrap();
    store.commit("base", "layer", None, labels("x"), Usage::default()).unwrap();
    let after = fs::read(&file).unwrap();
    let names = |root: &Path| -> Vec<String> {
        let (store, _) = Store::open(root).unwrap();
        store.list().iter().map(|record| record.name.clone()).collect()
    };
    // Commit, killed while writing the next record: at each byte, and before the rename.
    fs::write(&file, &before).unwrap();
    for cut in 0..=after.len() {
        fs::write(&next, &after[..cut]).unwrap();
        assert_eq!(names(root.path()), ["base"]);
        assert!(!next.exists(), "it stays for good");
    }
    fs::write(&file, &after).unwrap();
    assert_eq!(names(root.path()), ["layer"]);
    // Remove, killed after its only step.
    fs::rename(&file, dir.path().join(records::REMOVED)).unwrap();
    assert!(names(root.path()).is_empty());
    assert_eq!(open(root.path()).reclaimable().unwrap(), [dir.path()]);
    // Create, killed after each step: directory, marker, content directories, record.
    for steps in 0..4 {
        let root = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(root.path()).unwrap();
        let dir = store.dir(1);
        fs::create_dir(dir.path()).unwrap();
        if steps > 0 {
            records::begin(dir.path()).unwrap();
        }
        if steps > 1 {
            fs::create_dir(dir.fs()).unwrap();
        }
        if steps > 2 {
            fs::write(dir.path().join(records::RECORD), &before).unwrap();
        }
        let (store, _) = Store::open(root.path()).unwrap();
        assert_eq!(store.list().len(), usize::from(steps > 2), "killed after step {steps}");
        assert_eq!(store.reclaimable().unwrap().len(), usize::from(steps <= 2), "killed after step {steps}");
    }
}

#[test]
fn a_snapshot_whose_parent_is_lost_keeps_its_data_and_lives_again_with_a_new_one() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    make(&store, "p", None, Kind::Active).unwrap();
    let parent = store.commit("p", "parent", None, BTreeMap::new(), Usage::default()).unwrap();
    let child = make(&store, "child", Some("parent"), Kind::Active).unwrap();
    fs::write(store.dir(child.id).fs().join("data"), b"of a container").unwrap();
    fs::write(store.dir(parent.id).path().join(records::RECORD), b"").unwrap();
    drop(store);
    let (store, findings) = Store::open(root.path()).unwrap();
    assert_eq!(findings.len(), 1);
    assert!(findings[0].kept && matches!(findings[0].error, RecordError::Orphan));
    assert_eq!(store.list(), std::slice::from_ref(&child));
    assert_eq!(store.reclaimable().unwrap(), [store.dir(parent.id).path()], "nobody wrote there");
    let error = store.chain("child").unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.to_string().contains("crictl rmi"), "{error}");
    make(&store, "p", None, Kind::Active).unwrap();
    store.commit("p", "parent", None, BTreeMap::new(), Usage::default()).unwrap();
    assert_eq!(store.chain("child").unwrap().len(), 2);
    assert_eq!(store.remove("parent").unwrap_err().code(), Code::FailedPrecondition);
    store.remove("child").unwrap();
    store.remove("parent").unwrap();
}

/// A disk that does not answer for a moment costs nothing.
#[test]
fn a_record_that_cannot_be_read_is_not_taken_for_none() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let record = make(&store, "a", None, Kind::Active).unwrap();
    let file = store.dir(record.id).path().join(records::RECORD);
    drop(store);
    let aside = root.path().join("aside");
    fs::rename(&file, &aside).unwrap();
    // Opening it works, reading it fails.
    fs::create_dir(&file).unwrap();
    let (store, findings) = Store::open(root.path()).unwrap();
    assert!(findings[0].kept && matches!(findings[0].error, RecordError::Io(_)), "{findings:?}");
    assert!(store.reclaimable().unwrap().is_empty());
    drop(store);
    fs::remove_dir(&file).unwrap();
    fs::rename(&aside, &file).unwrap();
    assert_eq!(open(root.path()).list(), [record]);
}

#[test]
fn a_root_of_a_later_version_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let record = make(&store, "a", None, Kind::Active).unwrap();
    let file = store.dir(record.id).path().join(records::RECORD);
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replacen("soci-snapshot 1 ", "soci-snapshot 9 ", 1)).unwrap();
    let error = Store::open(root.path()).unwrap_err();
    assert!(matches!(error, OpenError::Newer(..)));
    assert!(soci_oci::with_causes(&error).contains("format 9"), "{error}");
}

#[test]
fn directories_of_the_go_daemon_are_left_alone() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("snapshots/41/fs")).unwrap();
    let store = open(root.path());
    assert_eq!(store.reclaimable().unwrap().len(), 1, "without its database nobody knows them");
    drop(store);
    fs::write(root.path().join("metadata.db"), b"bolt").unwrap();
    let store = open(root.path());
    assert!(store.reclaimable().unwrap().is_empty());
    assert_eq!(make(&store, "a", None, Kind::Active).unwrap().id, 42);
    store.remove("a").unwrap();
    assert_eq!(store.reclaimable().unwrap(), [store.dir(42).path()]);
}

#[test]
fn a_target_is_found_by_label_and_parent() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let content = || Written { labels: [(TARGET.to_owned(), "t".to_owned())].into(), ..Written::default() };
    store.draft(None).unwrap().write("t", Kind::Committed, content()).unwrap();
    store.draft(Some("t")).unwrap().write("t/2", Kind::Committed, content()).unwrap();
    assert_eq!(store.committed("t", None).unwrap().name, "t");
    assert_eq!(store.committed("t", Some("t")).unwrap().name, "t/2");
    assert!(store.committed("t", Some("t/2")).is_none());
    assert!(store.committed("other", None).is_none());
}

/// What the store must answer, in the simplest form.
#[derive(Debug, Default)]
struct Model(BTreeMap<String, (Kind, Option<String>, String)>);

#[derive(Debug, Clone)]
enum Op {
    Create { name: u8, parent: Option<u8>, view: bool },
    Commit { key: u8, name: u8, parent: Option<u8>, label: u8 },
    Remove { name: u8 },
    Update { name: u8, label: u8 },
    Reopen,
    Reclaim,
}

fn op() -> impl Strategy<Value = Op> {
    let name = 0..6_u8;
    let parent = proptest::option::of(0..6_u8);
    prop_oneof![
        4 => (name.clone(), parent.clone(), any::<bool>())
            .prop_map(|(name, parent, view)| Op::Create { name, parent, view: view && name > 3 }),
        4 => (name.clone(), name.clone(), proptest::option::weighted(0.2, 0..6_u8), 0..3_u8)
            .prop_map(|(key, name, parent, label)| Op::Commit { key, name, parent, label }),
        3 => name.clone().prop_map(|name| Op::Remove { name }),
        2 => (name, 0..3_u8).prop_map(|(name, label)| Op::Update { name, label }),
        1 => Just(Op::Reopen),
        1 => Just(Op::Reclaim),
    ]
}

impl Model {
    fn create(&mut self, name: &str, parent: Option<&str>, kind: Kind) -> Result<(), Code> {
        if let Some(parent) = parent {
            match self.0.get(parent) {
                None => return Err(Code::NotFound),
                Some((Kind::Committed, ..)) => {}
                Some(_) => return Err(Code::InvalidArgument),
            }
        }
        if self.0.contains_key(name) {
            return Err(Code::AlreadyExists);
        }
        self.0.insert(name.into(), (kind, parent.map(str::to_owned), String::new()));
        Ok(())
    }

    fn commit(&mut self, key: &str, name: &str, parent: Option<&str>, label: &str) -> Result<(), Code> {
        if self.0.contains_key(name) {
            return Err(Code::AlreadyExists);
        }
        let (kind, old, _) = self.0.get(key).cloned().ok_or(Code::NotFound)?;
        if kind != Kind::Active {
            return Err(Code::FailedPrecondition);
        }
        let parent = match (old, parent) {
            (None, Some(parent)) => match self.0.get(parent) {
                None => return Err(Code::NotFound),
                Some((Kind::Committed, ..)) => Some(parent.to_owned()),
                Some(_) => return Err(Code::FailedPrecondition),
            },
            (Some(old), Some(new)) if old != new => return Err(Code::InvalidArgument),
            (old, _) => old,
        };
        self.0.remove(key);
        self.0.insert(name.into(), (Kind::Committed, parent, label.into()));
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<(), Code> {
        if !self.0.contains_key(name) {
            return Err(Code::NotFound);
        }
        if self.0.values().any(|(_, parent, _)| parent.as_deref() == Some(name)) {
            return Err(Code::FailedPrecondition);
        }
        self.0.remove(name);
        Ok(())
    }

    fn update(&mut self, name: &str, label: &str) -> Result<(), Code> {
        self.0.get_mut(name).ok_or(Code::NotFound)?.2 = label.into();
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_store_answers_as_a_map_would(ops in proptest::collection::vec(op(), 1..40)) {
        let root = tempfile::tempdir().unwrap();
        let mut store = open(root.path());
        let mut model = Model::default();
        let text = |name: u8| format!("n{name}");
        for op in ops {
            let code = |result: Result<Arc<Record>, Error>| result.map(drop).map_err(|error| error.code());
            let (got, expected) = match &op {
                Op::Create { name, parent, view } => {
                    let (name, parent) = (text(*name), parent.map(text));
                    let kind = if *view { Kind::View } else { Kind::Active };
                    (
                        code(make(&store, &name, parent.as_deref(), kind)),
                        model.create(&name, parent.as_deref(), kind),
                    )
                }
                Op::Commit { key, name, parent, label } => {
                    let (key, name, parent, label) = (text(*key), text(*name), parent.map(text), text(*label));
                    (
                        code(store.commit(&key, &name, parent.as_deref(), labels(&label), Usage::default())),
                        model.commit(&key, &name, parent.as_deref(), &label),
                    )
                }
                Op::Remove { name } => (code(store.remove(&text(*name))), model.remove(&text(*name))),
                Op::Update { name, label } => (
                    code(store.update(&text(*name), |present| { *present = labels(&text(*label)); Ok(()) })),
                    model.update(&text(*name), &text(*label)),
                ),
                Op::Reopen => {
                    store = open(root.path());
                    (Ok(()), Ok(()))
                }
                Op::Reclaim => {
                    for dir in store.reclaimable().unwrap() {
                        fs::remove_dir_all(dir).unwrap();
                    }
                    (Ok(()), Ok(()))
                }
            };
            prop_assert_eq!(got, expected, "{:?}", op);
            let present: BTreeMap<_, _> = store.list().iter().map(|record| {
                let label = record.labels.get("l").cloned().unwrap_or_default();
                (record.name.clone(), (record.kind, record.parent.clone(), label))
            }).collect();
            prop_assert_eq!(&present, &model.0, "after {:?}", op);
            for record in store.list() {
                prop_assert!(store.dir(record.id).fs().exists());
            }
        }
    }
}
