//! Nothing that a client says in an error holds a secret: passwords, tokens, signatures of locations.

use std::time::Duration;

use soci_testkit::{Action, AuthMode, Fault, Listener, Matcher, Options};

use crate::common::{basic, context, digest, pattern, read, start};

#[tokio::test]
async fn no_error_holds_a_secret_or_a_signature() {
    let options = Options::default().auth(AuthMode::Bearer, "u", "hunter2").storage(Duration::from_secs(60));
    let (registry, client) = start(options).await;
    client.keychain.set(&registry.host(), vec![basic("u", "hunter2")]);
    let name = registry.put_blob("team/app", pattern(1_000));
    let repository = client.repository(&registry.image("team/app"));
    let blob = repository.blob(&digest(&name), 1_000);
    let secrets = ["hunter2", "dTpodW50ZXIy", "token-", "X-Amz-", "Bearer token"];
    let with_query = Action::Redirect("https://127.0.0.1:1/x?X-Amz-Signature=s1".into());
    let quoting = Action::Status {
        status: 500,
        headers: vec![],
        body: r#"{"errors":[{"code":"X","message":"GET https://s.example/x?X-Amz-Signature=s1 failed"}]}"#
            .into(),
    };
    for (listener, action) in [
        (Listener::Storage, Action::status(403)),
        (Listener::Storage, Action::Hangup),
        (Listener::Storage, Action::IgnoreRange),
        (Listener::Storage, Action::redirect_loop()),
        (Listener::Storage, with_query),
        (Listener::Registry, quoting),
        (Listener::Registry, Action::status(401)),
        (Listener::Token, Action::status(401)),
        (Listener::Token, Action::Hangup),
    ] {
        registry.clear_faults();
        registry.fault(Fault::new(Matcher::on(listener), action.clone()));
        registry.revoke_tokens();
        client.board.bump(&registry.host());
        let error = read(&blob, 5..10, &context()).await.unwrap_err();
        let mut text = format!("{error} {error:?}");
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text.push_str(&format!(" {error} {error:?}"));
            cause = error.source();
        }
        for secret in secrets {
            assert!(!text.contains(secret), "{secret} after {action:?} at {listener:?}: {text}");
        }
        assert!(text.contains("team/app"), "{text}");
    }
    assert!(!format!("{blob:?} {repository:?}").contains("hunter2"));
}
