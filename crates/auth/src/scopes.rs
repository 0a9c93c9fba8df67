//! What a token is asked for.
//!
//! Some token servers honour only the first scope, so the one that the request needs comes first. The host's own words
//! win where they name another resource than ours: behind a proxy the repository may have another name.

use crate::attempt::Access;

/// Returns the scopes to ask for, the needed one first, without duplicates.
pub(crate) fn wanted(challenged: &[String], repository: &str, access: &Access) -> Vec<String> {
    let needed: &[&str] = match access {
        Access::Pull => &["pull"],
        Access::Push | Access::PushMount { .. } => &["pull", "push"],
    };
    let ours = format!("repository:{repository}:");
    let mut actions: Vec<&str> = needed.to_vec();
    let mut others = Vec::new();
    for scope in challenged {
        match scope.strip_prefix(&ours) {
            Some(named) => {
                for action in named.split(',') {
                    if !action.is_empty() && !actions.contains(&action) {
                        actions.push(action);
                    }
                }
            }
            None => others.push(scope.clone()),
        }
    }
    let renamed = others.len() == challenged.len() && !challenged.is_empty();
    let mut scopes = Vec::new();
    if !renamed {
        scopes.push(format!("{ours}{}", actions.join(",")));
    }
    scopes.extend(others);
    if let Access::PushMount { from } = access {
        scopes.push(format!("repository:{from}:pull"));
    }
    let mut seen = std::collections::HashSet::new();
    scopes.retain(|scope| seen.insert(scope.clone()));
    scopes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_needed_scope_comes_first() {
        let mount = Access::PushMount { from: "base".into() };
        for (challenged, access, expected) in [
            (vec![], Access::Pull, vec!["repository:a/b:pull"]),
            (vec![], Access::Push, vec!["repository:a/b:pull,push"]),
            (vec![], mount.clone(), vec!["repository:a/b:pull,push", "repository:base:pull"]),
            (vec!["repository:a/b:pull"], Access::Push, vec!["repository:a/b:pull,push"]),
            (
                vec!["repository:a/b:pull,metadata_read"],
                Access::Pull,
                vec!["repository:a/b:pull,metadata_read"],
            ),
            (vec!["aws"], Access::Pull, vec!["aws"]),
            (
                vec!["repository:base:pull", "repository:a/b:pull"],
                mount,
                vec!["repository:a/b:pull,push", "repository:base:pull"],
            ),
        ] {
            let challenged: Vec<String> = challenged.into_iter().map(str::to_owned).collect();
            assert_eq!(wanted(&challenged, "a/b", &access), expected, "{challenged:?} {access:?}");
        }
    }
}
